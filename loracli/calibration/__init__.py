"""From JSONL to token batches: sources are read to records, records rendered to tokens, tokens planned as batches.

A newcomer's way in: `dataset` holds the whole path.
"""
