"""A console without third-party advertisements and without warnings that mean nothing here."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Drop Lightning's tips for paid services, and warnings about things that are so on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    for message in (
        ".*does not have many workers.*",  # the data is in memory: workers would only copy it
        ".*sync_dist=True.* when logging on epoch level.*",  # torchmetrics has summed over the ranks already
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in str(record.msg)
