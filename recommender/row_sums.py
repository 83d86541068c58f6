"""What needs no store: sums of slopes, merges, and rows that were read before. On the compiled kernels."""

from __future__ import annotations

import numpy as np

from elastic.errors import UserError
from elastic.tables.bags import Bags, Summed, check_slopes
from elastic.tables.spec import RowUpdate, TableSpec
from recommender import index_kernels, row_kernels
from recommender.row_store import NO_FLOATS, OPTIMIZERS, CompiledRows, in_order, pooled
from recommender.slabs import address


class CompiledKernels:
    """`elastic.tables.row_store.RowKernels`."""

    def create(self, spec: TableSpec, memory_bytes: int, disk_path: str = "") -> CompiledRows:
        if not disk_path or spec.vocabulary:
            return CompiledRows(spec, memory_bytes)
        try:
            from recommender.rocks_pages import RocksPages
        except ImportError as error:
            raise UserError(f'embedding.disk_path = "{disk_path}" needs RocksDB, which cannot be imported ({error}); '
                            "install the extra `tables`.") from error
        return CompiledRows(spec, memory_bytes, RocksPages(disk_path, spec.name))

    def distinct(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sorted_ids, order = index_kernels.ascending(ids)
        found, starts = index_kernels.groups(sorted_ids)
        stands = np.empty(ids.size, np.int64)
        stands[order] = np.repeat(np.arange(found.size), np.diff(starts))
        return found, stands

    def pool(self, rows: np.ndarray, index: np.ndarray, bags: Bags) -> np.ndarray:
        rows = np.ascontiguousarray(rows)
        return pooled(address(rows) + rows.itemsize * rows.shape[1] * index, rows.shape[1], bags)

    def deduplicate(self, spec: TableSpec, bags: Bags, slopes: np.ndarray) -> Summed:
        bags.check(spec)
        check_slopes(spec, bags, slopes)
        ids, weights = bags.ids, bags.weights
        rows = bags.runs[1] if bags.pooling == "none" else np.repeat(np.arange(bags.size), bags.lengths)
        if bags.is_filler is not None and bags.is_filler.any():
            real = ~np.repeat(bags.is_filler, bags.lengths)
            ids, rows, weights = ids[real], rows[real], None if weights is None else weights[real]
        if bags.divisors is not None:
            slopes = slopes / bags.divisors[:, None]
        slopes = np.ascontiguousarray(slopes)
        sorted_ids, order = index_kernels.ascending(ids)
        distinct, starts = index_kernels.groups(sorted_ids)
        sums = np.empty((distinct.size, spec.width), np.float32)
        row_kernels.pool(address(slopes) + slopes.itemsize * spec.width * rows[order], spec.width, starts,
                         np.arange(distinct.size),
                         NO_FLOATS if weights is None else weights[order], NO_FLOATS, address(sums))
        return Summed(distinct, sums, np.diff(starts).astype(np.int32))

    def merge(self, left: Summed, right: Summed) -> Summed:
        left, right = in_order(left), in_order(right)
        most, width = left.ids.size + right.ids.size, left.sums.shape[1]
        ids, sums, counts = np.empty(most, np.int64), np.empty((most, width), np.float32), np.empty(most, np.int32)
        num = row_kernels.merge(left.ids, right.ids, address(left.sums), address(right.sums), width, left.counts,
                                right.counts, ids, address(sums),
                                counts)
        return Summed(ids[:num], sums[:num], counts[:num])

    def update(self, spec: TableSpec, update: RowUpdate, step: int, values: np.ndarray, slots: np.ndarray,
               sums: np.ndarray) -> None:
        assert all(array.flags.c_contiguous for array in (values, slots, sums))
        whole = [np.array([address(array)]) for array in (values, slots)]
        row_kernels.update(OPTIMIZERS[spec.optimizer], *whole, row_kernels.WHOLE, spec.width, spec.num_slots,
                           np.arange(len(values)),
                           np.ones(len(values), bool), address(sums), tuple(update.numbers(step)))


KERNELS = CompiledKernels()
