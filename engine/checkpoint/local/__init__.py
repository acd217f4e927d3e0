"""Checkpoints on the hosts themselves (checkpoint.local_every_steps): often, in memory or on a disk of their own.

Every rank writes what it owns under local_dir of its host and sends a copy to a rank of the next host, so that a set
survives the loss of any one host. Nothing of it is on the shared file system. A start at the same layout goes on from
the newest complete set, if that is newer than the newest checkpoint of the run folder: files that a host lacks (a new
one has none) come from where there is a copy. Every file is hashed. A set that cannot be written is said and training
goes on; sets are forgotten when a step after them was not sound, for their state may be the cause.

LOCAL_DIR/eva-megatron-UID/RUN/step_00000012.t1p2d4/{rank_00003.safetensors, rank_00003.json, head/manifest.json}
"""
