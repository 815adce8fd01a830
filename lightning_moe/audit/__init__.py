"""The causality audit: does anything but a token's own past change its routing, or what is predicted from it?"""

from lightning_moe.audit.checks import audit
from lightning_moe.audit.findings import Finding, Verdict, verdict
from lightning_moe.audit.report import format_report

__all__ = ["Finding", "Verdict", "audit", "format_report", "verdict"]
