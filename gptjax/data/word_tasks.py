"""To come."""

WORD_TASKS = "word-tasks"


def word_tasks() -> list[dict[str, str]]:
    """None yet."""
    return []
