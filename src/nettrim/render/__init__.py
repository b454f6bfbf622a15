"""Presentation: a pruning report and its certificate as tables, as plain sentences and as one self-contained page.

Nothing is computed here that a certificate could rest on; this package only rounds and words numbers that others measured.
Numbers that state an upper bound are rounded up, agreement is rounded down, so that no rounded sentence claims too much.
"""

from .page import report_html
from .tables import ComparisonRow, certificate_table, comparison_table, report_table, report_text
from .words import certificate_words, layer_remarks

__all__ = [
    "ComparisonRow",
    "certificate_table",
    "certificate_words",
    "comparison_table",
    "layer_remarks",
    "report_html",
    "report_table",
    "report_text",
]
