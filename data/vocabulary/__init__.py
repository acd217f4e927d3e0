"""The merges of CLIP's byte-pair encoding, clip_merges.txt.gz: the 48,894 that its vocabulary of 49,408 uses, in order.

They are the first lines of bpe_simple_vocab_16e6.txt of OpenAI's CLIP, under the MIT licence of LICENSE beside it.
"""
