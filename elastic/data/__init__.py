"""Which sample is fed where and when: the sampler (a pure function), data sets, loading and prefetching."""

from elastic.data.dataset import Dataset, MapStyle
from elastic.data.loader import Prefetcher, eval_batches, load_batch
from elastic.data.sampler import Sampler

__all__ = ["Dataset", "MapStyle", "Prefetcher", "Sampler", "eval_batches", "load_batch"]
