from evaluation.tasks.stub import stub

__all__ = ["stub"]
