"""Snakemake's executor for Kubernetes, on a volume that all pods share.

`snakemake-executor-plugin-kubernetes` takes for granted that nothing is shared, and copies each job's files through an
object store. Finegrid's stages find their files by place, and a training that died goes on from checkpoints beside it:
with one volume in all pods both hold, as on any cluster. Found by Snakemake where this folder is on PYTHONPATH.
"""

from dataclasses import replace

import snakemake_executor_plugin_kubernetes as plugin
from snakemake_executor_plugin_kubernetes import Executor, ExecutorSettings

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

common_settings = replace(
    plugin.common_settings,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,
)
