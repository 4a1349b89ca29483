"""What it costs to keep and to look at a long distillation: 100,000 updates of each of 57 layers.

The real store and the real window code, against one table with a row per update and a REAL column
per metric, asked by GROUP BY. Both hold the same numbers. The rows' table is filled with fewer
updates (``--row-updates``) where the whole would take minutes; its figures are per update or
scaled, and say so.
"""

from __future__ import annotations

import argparse
import math
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from sqlalchemy import insert
from support.events import RunScript, batch

from attnscope.attention.distillation import TRAINING_METRIC_NAMES
from attnscope.backend import distillation, ingest
from attnscope.backend.app import create_app
from attnscope.backend.config import Config
from attnscope.db import runs, student_blocks, student_models
from attnscope.db.student_blocks import BLOCK, Column, Updates

RESULTS = (
    "distillation_heatmap_query_ms",
    "distillation_zoom_query_ms",
    "distillation_query_over_rows",
    "distillation_bytes_per_update",
    "distillation_ingest_updates_per_s",
)

LAYERS = 57
HELDOUT = frozenset(
    {"nmse", "nmse_ema", "cosine", "norm_ratio", "mean_ratio", "std_ratio", "error_p95"}
    | {"error_p99", "topk_overlap"}
)
ABSENT = frozenset({"attention_kl", "log_mass_bias"})
"""What one kind of student or another doesn't have."""
METRIC = "loss"


def columns_of(layer: int, updates: int) -> Updates:
    """A layer's training: noise around an error that falls, every tenth update measured."""
    draw = np.random.default_rng(layer)
    number = np.arange(1, updates + 1, dtype=np.int64)
    error = 0.5 / (1 + 0.01 * number) + 0.002
    metrics = {}
    for name in TRAINING_METRIC_NAMES:
        measured = np.full(updates, name not in ABSENT)
        if name in HELDOUT:
            measured &= number % 10 == 0
        values = (error * draw.lognormal(0, 0.3, updates)).astype(np.float32)
        metrics[name] = Column(values, measured)
    at = 1.7e9 + number * 0.1
    whole = {"update": number, "step": number // 20, "seq": number}
    return Updates(whole, at, metrics)


def fill(store: Any, run: int, updates: int) -> float:
    """Write blocks as the server does, without the way there; seconds."""
    begin = time.perf_counter()
    full = updates // BLOCK * BLOCK

    def work(tx: Any, layer: int) -> None:
        made = columns_of(layer, updates).cut(0, full)
        rows = []
        for start in range(0, full, BLOCK):
            part = made.cut(start, start + BLOCK)
            about = {
                "run": run,
                "layer": layer,
                "block": start // BLOCK,
                "count": BLOCK,
                "first_update": start + 1,
                "last_update": start + BLOCK,
            }
            rows.extend({**about, "name": n, "data": d} for n, d in part.packed().items())
        tx.session.execute(insert(student_models.StudentBlock), rows)
        tx.session.add(
            student_models.StudentLayer(
                run=run,
                layer=layer,
                updates=full,
                packed=full,
                first_update=1,
                last_update=full,
                nonfinite=0,
                latest={},
            )
        )

    for layer in range(LAYERS):
        store.write(lambda tx, layer=layer: work(tx, layer))
    return time.perf_counter() - begin


def median_ms(work: Any, times: int) -> float:
    """Median time of a piece of work."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append((time.perf_counter() - begin) * 1000)
    return sorted(taken)[times // 2]


def rows_table(path: Path, updates: int) -> tuple[sqlite3.Connection, float]:
    """The alternative: a row per update; the connection, and seconds to fill it."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    names = ", ".join(f'"{name}" REAL' for name in TRAINING_METRIC_NAMES)
    connection.execute(
        'CREATE TABLE rows (run INT, layer INT, "update" INT, step INT, seq INT, at REAL, '
        f'{names}, PRIMARY KEY (run, layer, "update")) WITHOUT ROWID'
    )
    seconds = 0.0
    for layer in range(LAYERS):
        made = columns_of(layer, updates)
        columns = [
            [
                value if known else None
                for value, known in zip(c.values.tolist(), c.measured.tolist(), strict=True)
            ]
            for c in made.metrics.values()
        ]
        whole = [column.tolist() for column in made.whole.values()]
        rows = list(
            zip([1] * updates, [layer] * updates, *whole, made.at.tolist(), *columns, strict=True)
        )
        begin = time.perf_counter()
        marks = ", ".join("?" * len(rows[0]))
        with connection:
            connection.executemany(f"INSERT INTO rows VALUES ({marks})", rows)
        seconds += time.perf_counter() - begin
    return connection, seconds


def ask_rows(connection: sqlite3.Connection, first: int, last: int, width: int) -> None:
    """Smallest, largest and count per layer and bucket, by the database."""
    connection.execute(
        f'SELECT layer, "update" / {width}, min({METRIC}), max({METRIC}), count({METRIC}) '
        'FROM rows WHERE run = 1 AND "update" BETWEEN ? AND ? GROUP BY 1, 2',
        (first, last),
    ).fetchall()


def ingest_rate(services: Any, events: int, each: int) -> float:
    """Updates per second through the server's own code, from JSON to the transaction's end."""
    script = RunScript(layers=LAYERS, variant="ttr")
    from support.events import instance

    of = instance()
    bodies = [batch(of, script.started()).model_dump_json().encode()]
    for index in range(events):
        made = script.updates(range(index * each + 1, index * each + each + 1))
        bodies.append(batch(of, made).model_dump_json().encode())
    begin = time.perf_counter()
    for body in bodies:
        ingest.store(services, ingest.parse(body))
    return events * each * LAYERS / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--row-updates", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(Config(data_dir=Path(folder) / "data"))
        services = app.state.services
        services.config.data_dir.mkdir()
        from attnscope.db import migrate

        migrate.upgrade(services.store)
        rate = ingest_rate(services, 60, 20)
        script = RunScript(layers=LAYERS, variant="ttr")
        from support.events import instance

        ingest.store(services, batch(instance(), script.started()))
        with services.store.read() as session:
            run = runs.find(session, script.run_id)
        assert run is not None
        database = services.config.data_dir / "attnscope.db"
        services.store.write(lambda tx: None)
        before = database.stat().st_size
        seconds = fill(services.store, run.id, options.updates)
        services.store.close()
        sqlite3.connect(database).execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        total = options.updates // BLOCK * BLOCK
        size = (database.stat().st_size - before) / (total * LAYERS)
        print(
            f"blocks: {total:,} updates of {LAYERS} layers packed and written in {seconds:.1f} s"
        )

        metric = distillation.metric_of(METRIC)

        def look(first: int | None, last: int | None) -> bytes:
            with services.store.read() as session:
                found = runs.find(session, script.run_id)
                assert found is not None
                return distillation.as_json(
                    distillation.window(
                        session, found, metric, ("heatmap", "bands"), first=first, last=last
                    )
                )

        answer = look(None, None)
        middle = total // 2
        whole_ms = median_ms(lambda: look(None, None), options.times)
        zoom_ms = median_ms(lambda: look(middle, middle + 5000), options.times)
        lines_ms = median_ms(lambda: look(middle, middle + total // 5), options.times)

        table = Path(folder) / "rows.db"
        connection, row_seconds = rows_table(table, options.row_updates)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        row_size = table.stat().st_size / (options.row_updates * LAYERS)
        width = 1 << max(0, math.ceil(math.log2(options.row_updates / 1000)))
        few = options.row_updates

        def look_few() -> None:
            look(1, few)

        # the same numbers of updates on both sides, in turn
        pairs = []
        for _ in range(options.times):
            blocks_ms = median_ms(look_few, 1)
            rows_ms = median_ms(lambda: ask_rows(connection, 1, few, width), 1)
            pairs.append((blocks_ms, rows_ms))
        ratios = sorted(blocks / rows for blocks, rows in pairs)
        blocks_ms, rows_ms = (sorted(side)[len(pairs) // 2] for side in zip(*pairs, strict=True))
        rows_zoom = median_ms(lambda: ask_rows(connection, 5000, 10_000, 8), options.times)
        print(
            f"one metric, all of {total:,} x {LAYERS}, as {len(answer):,} bytes of JSON: "
            f"{whole_ms:.0f} ms; a fifth {lines_ms:.0f} ms; 5,000 updates {zoom_ms:.0f} ms"
        )
        print(
            f"{few:,} x {LAYERS}: blocks {blocks_ms:.0f} ms, rows {rows_ms:.0f} ms; "
            f"5,000 of them from rows {rows_zoom:.0f} ms"
        )
        print(
            f"rows: {row_size:.0f} bytes an update, "
            f"{few * LAYERS / row_seconds:,.0f} a second written; blocks: {size:.0f} bytes"
        )
        print(f"RESULT distillation_heatmap_query_ms {whole_ms:.0f}")
        print(f"RESULT distillation_zoom_query_ms {zoom_ms:.0f}")
        print(f"RESULT distillation_query_over_rows {ratios[len(ratios) // 2]:.3f}")
        print(f"RESULT distillation_bytes_per_update {size:.1f}")
        print(f"RESULT distillation_ingest_updates_per_s {rate:.0f}")
        connection.close()
        services.store.close()


if __name__ == "__main__":
    assert student_blocks.COLUMNS
    main()
