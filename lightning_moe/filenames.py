"""Names of the files in a run's folder ``<output_dir>/<run_name>/``.

They stand on the ground floor because every package that reads or writes a run needs them.
"""

CONFIG_FILE = "config.yaml"  # the complete configuration
SEGMENTS_FILE = "segments.json"  # parts with other settings, of a run that was continued so
SUMMARY_FILE = "summary.json"  # the result, written last: a run that has it is finished
TOKENIZER_FILE = "tokenizer.json"  # of an export, too
METRICS_FILE = "metrics.jsonl"  # logged metrics, a line per call
JOURNAL_FILE = "tracking.jsonl"  # every other event that MLflow is told, a line each
MLFLOW_RUN_FILE = "mlflow_run.json"  # which MLflow run this is, and how much of the two files above it holds
ARTIFACTS_FOLDER = "artifacts"  # copies of files from elsewhere that MLflow gets
EVALUATIONS_FOLDER = "evaluations"  # records of `validate` and `test`

CHECKPOINT_FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
PREVIOUS_CHECKPOINT = "previous.ckpt"  # what `last.ckpt` was before
