"""The page about a results folder, and the terminal's tables; `ovqk.report.write_report` writes the page."""

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    if name == "write_report":
        from ovqk.report.write import write_report

        return write_report
    raise AttributeError(f"module 'ovqk.report' has no attribute '{name}'")
