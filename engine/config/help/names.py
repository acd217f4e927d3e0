"""Which setting was meant: names of open_clip, EVA, Megatron-LM and torchtitan, and near misses."""

import difflib
import re
from collections.abc import Mapping

OURS = {
    "lr": "optim.lr_vision and optim.lr_text",
    "learning_rate": "optim.lr_vision and optim.lr_text",
    "visual_lr": "optim.lr_vision",
    "text_lr": "optim.lr_text",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "wd": "optim.weight_decay",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_eps": "optim.eps",
    "warmup": "optim.warmup_steps",
    "lr_warmup_iters": "optim.warmup_steps",
    "min_lr": "optim.min_lr_ratio",
    "clip_grad": "optim.clip_grad_norm",
    "grad_clip_norm": "optim.clip_grad_norm",
    "max_norm": "optim.clip_grad_norm",
    "ld": "optim.layer_decay_vision and optim.layer_decay_text",
    "layer_decay": "optim.layer_decay_vision and optim.layer_decay_text",
    "visual_ld": "optim.layer_decay_vision",
    "text_ld": "optim.layer_decay_text",
    "batch_size": "train.global_batch_size (pairs of all ranks) and train.micro_batch_size (images of one pass)",
    "global_batch": "train.global_batch_size",
    "local_batch_size": "train.global_batch_size (pairs of all ranks)",
    "micro_batch": "train.micro_batch_size",
    "accum_freq": "train.micro_batch_size: the batch is cut by it",
    "grad_accum": "train.micro_batch_size: the batch is cut by it",
    "gradient_accumulation_steps": "train.micro_batch_size: the batch is cut by it",
    "grad_accum_steps": "train.micro_batch_size: the batch is cut by it",
    "epochs": "train.steps (epochs x samples / train.global_batch_size)",
    "iters": "train.steps",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "train_num_samples": "train.steps (samples / train.global_batch_size)",
    "compile": "model.norm_kernel",
    "torch_compile": "model.norm_kernel",
    "dropout": "train.patch_dropout",
    "scheduler": "no setting: warm-up and cosine (optim.warmup_steps, optim.min_lr_ratio)",
    "lr_scheduler": "no setting: warm-up and cosine (optim.warmup_steps, optim.min_lr_ratio)",
    "grad_clip": "optim.clip_grad_norm",
    "max_grad_norm": "optim.clip_grad_norm",
    "ema": "optim.ema_decay",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=bf16",
    "amp": "train.precision=bf16",
    "dtype": "train.precision",
    "fp8": "model.fp8",
    "grad_checkpointing": "train.recompute",
    "recompute_granularity": "train.recompute",
    "activation_checkpoint": "train.recompute",
    "force_patch_dropout": "train.patch_dropout",
    "temperature": "train.logit_scale (1 / temperature)",
    "siglip": "train.loss=sigmoid",
    "tp": "parallel.tensor",
    "tensor_parallel": "parallel.tensor",
    "tensor_parallel_degree": "parallel.tensor",
    "tensor_model_parallel_size": "parallel.tensor",
    "pp": "parallel.pipeline",
    "pipeline_parallel": "parallel.pipeline",
    "pipeline_parallel_degree": "parallel.pipeline",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "vpp": "parallel.virtual",
    "virtual_pipeline_model_parallel_size": "parallel.virtual",
    "num_layers_per_virtual_pipeline_stage": "parallel.virtual",
    "fsdp": "parallel.shard",
    "zero": "parallel.shard",
    "zero_stage": "parallel.shard",
    "use_distributed_optimizer": "parallel.shard",
    "cp": "no setting: there is no context parallelism",
    "context_parallel": "no setting: there is no context parallelism",
    "ep": "no setting: there are no experts",
    "world_size": "no setting: the ranks are torchrun's, --nproc-per-node and --nnodes",
    "gpus": "no setting: the ranks are torchrun's, --nproc-per-node and --nnodes",
    "num_gpus": "no setting: the ranks are torchrun's, --nproc-per-node and --nnodes",
    "nodes": "no setting: the ranks are torchrun's, --nproc-per-node and --nnodes",
    "nnodes": "no setting: the ranks are torchrun's, --nproc-per-node and --nnodes",
    "device": "no setting: GPUs where there are some, else the CPU",
    "accelerator": "no setting: GPUs where there are some, else the CPU",
    "dp": "no setting: DP is what is left of the ranks",
    "data_parallel": "no setting: DP is what is left of the ranks",
    "sp": "parallel.sequence",
    "sequence_parallel": "parallel.sequence",
    "train_data": "data.shards",
    "data_path": "data.shards",
    "path": "data.shards",
    "shard": "data.shards, or parallel.shard",
    "urls": "data.shards",
    "aug": "data.crop_scale and data.flip",
    "val_check_interval": "evaluate.every_steps",
    "eval_steps": "evaluate.every_steps",
    "save_steps": "checkpoint.every_steps",
    "ckpt_interval": "checkpoint.every_steps",
    "resume_from": "checkpoint.resume",
    "resume_from_checkpoint": "checkpoint.resume",
    "ckpt": "checkpoint.resume, or init.vision and init.text",
    "dataset": "data.shards",
    "num_workers": "data.workers",
    "val_data": "evaluate.shards",
    "imagenet_val": "evaluate.shards",
    "val_frequency": "evaluate.every_steps",
    "eval_interval": "evaluate.every_steps",
    "zeroshot_frequency": "evaluate.every_steps",
    "img_size": "model.vision.image_size",
    "force_image_size": "model.vision.image_size",
    "pretrained": "init.vision and init.text",
    "pretrained_image": "init.vision",
    "pretrained_visual_model": "init.vision",
    "pretrained_text_model": "init.text",
    "save_frequency": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "load": "checkpoint.resume",
    "save": "run_dir",
    "logs": "run_dir",
    "output_dir": "run_dir",
    "output": "run_dir",
    "out": "run_dir",
    "run_name": "run_dir",
    "exp_name": "run_dir",
    "experiment": "run_dir",
    "log_interval": "log.every_steps",
    "report_to": "log.tensorboard",
}
"""A name of another project -> what it is called here."""


def hint(path: str, known: Mapping[str, object] | None = None) -> str:
    """What may be meant by a key that is no setting, in brackets; empty where nothing comes near."""
    if known is None:
        from engine.config.help.fields import settings  # they ask for a hint, too

        known = settings()
    plain = re.sub(r"^phases\[\d+\]\.", "", path)
    name = re.sub(r"-", "_", plain.rpartition(".")[2]).lower()
    if name in OURS:
        return f" ({OURS[name]})" if OURS[name].startswith("no setting") else f" (here it is {OURS[name]})"
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    elsewhere = [key for key in elsewhere if "[]" not in key] or elsewhere  # entries of lists last
    near = elsewhere or difflib.get_close_matches(plain, known, n=3, cutoff=0.8)
    names: dict[str, list[str]] = {}
    for key in known:
        names.setdefault(key.rpartition(".")[2], []).append(key)
    if not near:
        near = [key for close in difflib.get_close_matches(name, names, n=2, cutoff=0.75) for key in names[close]]
    return f" (did you mean {' or '.join(near[:3])}?)" if near else ""
