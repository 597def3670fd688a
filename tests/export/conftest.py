"""What pytest must not import."""

collect_ignore = ["plain"]
