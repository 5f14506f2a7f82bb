"""The report page: `write_report(runs, out)`."""

from .page import write_report as write_report
