"""The comparison of recipes: which runs, what is measured of each, and the page of what came out."""

from training.ablation.config import AblationConfig, load_ablation
from training.ablation.measures import try_out
from training.ablation.plan import Job, find_jobs, ready, training_config
from training.ablation.report import write_bench, write_report
from training.ablation.trial import check_start, run_job

__all__ = [
    "AblationConfig",
    "Job",
    "check_start",
    "find_jobs",
    "load_ablation",
    "ready",
    "run_job",
    "training_config",
    "try_out",
    "write_bench",
    "write_report",
]
