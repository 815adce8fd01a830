"""export on the command line."""

from pathlib import Path

import torch
import transformers
from helpers.small_run import Command

CKPT = "runs/a/checkpoints/last.ckpt"


def test_a_run_becomes_a_folder_and_nothing_is_overwritten_unasked(command: Command, workplace: Path) -> None:
    code, _, err = command("fit", "--config", "small", "--run_name=a")
    assert code == 0, err
    code, _, err = command("export", "--ckpt_path", CKPT, "--output=model")
    assert code == 0, err
    card = Path("model/README.md").read_text()
    assert "# a\n" in card
    assert "ExpertThreshold, 4 experts per MoE layer" in card
    assert "| training | 4 steps |" in card
    assert "| bits_per_byte | " in card
    model = transformers.AutoModelForCausalLM.from_pretrained(workplace / "model", trust_remote_code=True)
    checkpoint = torch.load(CKPT, weights_only=True)["state_dict"]
    threshold = "blocks.1.moe.state.threshold"
    assert torch.equal(model.state_dict()[threshold], checkpoint[f"decoder.{threshold}"])

    code, _, err = command("export", "--ckpt_path", CKPT, "--output=model")
    assert code == 2
    assert "--output model: exists; --overwrite replaces it" in err
    (workplace / "mine").mkdir()
    code, _, err = command("export", "--ckpt_path", CKPT, "--output=mine", "--overwrite")
    assert code == 2
    assert "is not an exported folder" in err
    code, _, err = command("export", "--ckpt_path", CKPT, "--output=model", "--overwrite")
    assert code == 0, err
    code, _, err = command("export", "--ckpt_path=gone.ckpt", "--output=b")
    assert code == 2
    assert "no such file" in err
