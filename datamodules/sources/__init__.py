"""Where shards come from: this machine, or http, s3, gs and hf behind a bounded cache."""

from datamodules.sources.sources import Sources

__all__ = ["Sources"]
