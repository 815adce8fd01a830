"""A console without third-party advertisements, and without advice and warnings that mean nothing here."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Drop Lightning's tips for paid services, and advice and warnings about things that are so on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_wanted)
    for message in (
        ".*does not have many workers.*",  # the data is in memory: workers would only copy it
        ".*sync_dist=True.* when logging on epoch level.*",  # torchmetrics has summed over the ranks already
        ".*module.s. in eval mode at the start of training.*",  # released models have neither dropout nor jitter
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Return false for tips, and for the advice to round fp32 products, which are exact on purpose (decision 89)."""
    return not any(words in str(record.msg) for words in ("Tip:", "set_float32_matmul_precision"))
