"""``python -m lightning_moe.tracking RUN_DIR``: send to MLflow what it lacks of a run."""

import argparse
import sys

from lightning_moe.errors import UserError
from lightning_moe.processes import repair_streams
from lightning_moe.tracking.recovery import upload
from lightning_moe.tracking.store import run_url
from lightning_moe.tracking.worker import set_environment


def main() -> int:
    """Send the run; return exit code 0 when MLflow has the whole run, 2 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m lightning_moe.tracking", description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", help="the run's directory, <output_dir>/<run_name>")
    parser.add_argument("--tracking_uri", metavar="URI", help="MLflow's store (default: the run's)")
    parser.add_argument("--experiment_name", metavar="NAME", help="MLflow experiment (default: the run's)")
    repair_streams()
    args = parser.parse_args()
    set_environment()
    try:
        state = upload(args.run_dir, args.tracking_uri, args.experiment_name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"MLflow has the whole run: {run_url(state.tracking_uri, state.experiment_id, state.run_id)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
