"""The report of a run: one HTML page that needs nothing but itself."""

from ttr_controller.report.page import write_report
from ttr_controller.report.results import Results, ResultsError, load_results

__all__ = ["Results", "ResultsError", "load_results", "write_report"]
