"""One page with all the evidence: is a later stage hurting an earlier one, and what would a repair bring?"""

from surgery.report.inquiry import Inquiry, analyse
from surgery.report.sections import write_report

__all__ = ["Inquiry", "analyse", "write_report"]
