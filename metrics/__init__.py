"""What a run tells about itself; nothing in here changes a step."""
