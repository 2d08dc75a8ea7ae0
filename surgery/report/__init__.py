"""One page with all the evidence: does a later stage hurt an earlier one, and what would a repair bring back?"""

from surgery.report.inquiry import Inquiry, analyse
from surgery.report.sections import write_report

__all__ = ["Inquiry", "analyse", "write_report"]
