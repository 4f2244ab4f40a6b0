"""What a run tells: its folder, `metrics.jsonl` for programs, one line of progress for people."""
