"""The scores of a generation as text."""

from __future__ import annotations

from lightning_moe.replay.routes import Made
from lightning_moe.replay.score import Divergence, Score
from lightning_moe.report.tables import text_table


def format_score(score: Score, made: Made, precision: str) -> str:
    """Lay out how far two passes over a generation's tokens differ from it.

    Args:
        score: result of `score`.
        made: how the generation was made.
        precision: precision of the passes.
    """
    flips = score.free_flips
    by_layer = [
        ["layer", "tokens with other experts", "differing token–expert pairs"],
        *([name, f"{t:.3%}", f"{p:.3%}"] for name, t, p in zip(score.layers, flips.tokens, flips.pairs, strict=True)),
        ["any layer", f"{flips.tokens_in_any_layer:.3%}", ""],
    ]
    passes = [("free", score.free, flips.tokens_in_any_layer), ("replayed", score.replayed, 0.0)]
    table = [
        ["", *(name for name, _, _ in passes)],
        ["tokens with other experts", *(f"{share:.3%}" for _, _, share in passes)],
        *([name, *(_shown(found, key) for _, found, _ in passes)] for name, key in _rows(made)),
    ]
    return (
        f"{score.num_tokens:,} tokens, {score.num_new_tokens:,} of them new, generated in {made.precision}, "
        f"scored in {precision}\n\n"
        f"{text_table(by_layer, {1, 2})}\n\n{text_table(table, {1, 2})}\n\n"
        f"KL(free ‖ replayed), exact: {score.free_to_replayed:.3g} nats per new token\n"
        "free: experts chosen by the rule; replayed: experts as recorded; "
        "r: log p(new token) in the generation − in the pass" + ("" if made.samples_the_model else f"\n{_no_kl(made)}")
    )


def _rows(made: Made) -> list[tuple[str, str]]:
    kl = [("KL(generation ‖ pass) / nats, mean of exp(−r) − 1 + r", "kl")] if made.samples_the_model else []
    return [*kl, ("mean of r", "log_ratio"), ("largest |r|", "largest")]


def _shown(found: Divergence, key: str) -> str:
    error = getattr(found, f"{key}_error", None)
    value = f"{getattr(found, key):.3g}"
    return value if error is None else f"{value} ± {error:.1g}"


def _no_kl(made: Made) -> str:
    options = {"temperature": made.temperature, "top_k": made.top_k, "top_p": made.top_p}
    used = ", ".join(f"{key}={value:g}" for key, value in options.items() if value is not None)
    return f"No estimate of the KL: the tokens were not drawn from the model's own distribution ({used})."
