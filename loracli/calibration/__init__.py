"""From JSONL to token batches.

    sources        FILE, FILE:WEIGHT, standard input
    records        lines to records: `checks` of values, `shapes`, `conversations`
    dataset        several files, `split` into training and held-out records
    render         records to tokens and what is scored: `tokens` of texts, `chat` templates
    batches        the plan of micro-batches
"""
