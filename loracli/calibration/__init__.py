"""From a JSONL file to token batches: records, validation by line, chat templates and loss masks, the plan of
batches."""
