"""Attaching to one vLLM worker: four of its methods are wrapped, and nothing that we do there can fail it.

Every entry into our code goes through Attachment._guarded: an exception is logged once, counted, and after a few
in a row the monitor takes itself off. The worker's own result is returned whatever happens here.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Final

from latentwatch import __version__
from latentwatch.engines.vllm import arming, kv_cache, lone_forward, row_map, served_model, settings
from latentwatch.engines.vllm.arming import ArmedHook
from latentwatch.engines.vllm.exporter_process import ExporterChild
from latentwatch.engines.vllm.interfaces import ModelRunner, SchedulerOutput, VllmConfig, Worker
from latentwatch.engines.vllm.settings import PluginSettings
from latentwatch.engines.vllm.step_tap import StepTap
from latentwatch.errors import EngineRefused, Refusal, RefusalReason
from latentwatch.facts import IDENTITY_TEXT_CHARACTERS, EngineIdentity
from latentwatch.handover.exporter_config import CachedBlocks, ExporterConfig, WatchedFeature
from latentwatch.handover.ring import Geometry, Ring
from latentwatch.kernels.reference import UNWRITTEN
from latentwatch.names import Reason
from latentwatch.watchlist.file import Feature, Watchlist

logger = logging.getLogger("vllm.latentwatch")
"""Under vLLM's own logger, so that its handlers and format apply."""

MAX_FAILURES: Final = 3
"""In a row; one step that succeeds forgives those before it. Then for good, until the engine is started again: what
began, ended and moved in the steps that were not seen is known to nobody, and tokens would be scored for the wrong
request.
"""


class Attachment:
    """The monitor of one worker, from load to shutdown."""

    def __init__(
        self,
        worker: Worker,
        chosen: PluginSettings,
        forward: Callable[[Worker, int], object] = lone_forward.run,
    ) -> None:
        self._worker = worker
        self._settings = chosen
        self._forward = forward
        self._hooks: tuple[ArmedHook, ...] = ()
        self._refusal: Refusal | None = None
        self._served = served_model.NOT_COMPARED
        self._ring: Ring | None = None
        self._tap: StepTap | None = None
        self._cache: kv_cache.KvCache | None = None
        self._exporter: ExporterChild | None = None
        self._failures = 0
        self._process = os.getpid()
        self._boot_id = uuid.uuid4().hex
        for name, before, after in (
            ("load_model", None, self._loaded),
            ("compile_or_warm_up_model", None, self._warmed_up),
            ("execute_model", None, self._stepped),
            ("shutdown", self._shutting_down, None),
        ):
            self._wrap(name, before, after)

    @property
    def salt(self) -> str:
        """What must be part of the compile-cache key: which op stands in the graph of this worker."""
        if not self._hooks:
            return ""
        return settings.graph_key([hook.rows for hook in self._hooks], [hook.reader for hook in self._hooks])

    def _wrap(self, name: str, before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
        original = getattr(self._worker, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            if before is not None:
                self._guarded(before, *args, **kwargs)
            result = original(*args, **kwargs)
            if after is not None:
                self._guarded(after, *args, **kwargs)
            return result

        setattr(self._worker, name, wrapped)

    def _guarded(self, function: Callable[..., None], *args: object, **kwargs: object) -> None:
        if self._failures >= MAX_FAILURES or self._is_forked():
            return
        try:
            function(*args, **kwargs)
        except Exception:
            # Whatever it is, it must not reach the engine (I4): counted, logged, and after a few the monitor goes.
            self._failures += 1
            logger.exception(
                "latentwatch: %s failed (%d of %d); serving goes on", function.__name__, self._failures, MAX_FAILURES
            )
            if self._failures == MAX_FAILURES:
                logger.error(
                    "latentwatch: the monitor takes itself off this worker; its tokens are not scored from here on"
                )
                self._stop_exporter()

    def _is_forked(self) -> bool:
        """Whether this is a copy of the process that was attached to: ring and exporter are the original's, which a
        copy that serves, or ends, must leave alone.
        """
        if os.getpid() == self._process:
            return False
        logger.error("latentwatch: process %d is a fork of the engine's; what it serves is not monitored", os.getpid())
        self._failures = MAX_FAILURES
        return True

    # load_model: after the weights are there and before the first forward is traced.

    def _loaded(self, *_args: object, **_kwargs: object) -> None:
        if not self._reports():
            return
        self._or_disarmed(self._arm)
        features = [feature for hook in self._hooks for feature in hook.rows.features]
        self._ring = Ring.create(self._geometry(features, len(self._hooks)))
        if self._settings.collector:
            self._exporter = ExporterChild(self._ring)
        else:
            logger.error(
                "latentwatch: %s is not set; nothing is exported. Set it to unix:///path or host:port.",
                settings.COLLECTOR,
            )

    def _arm(self) -> None:
        """Raises: Refusal: the watchlist, the engine or the model is not one whose scores would be right."""
        watchlist = settings.load_watchlist(self._settings)
        if isinstance(watchlist, Refusal):
            raise watchlist
        _check_engine(self._worker)
        config = self._worker.vllm_config
        arming.check_model(config.model_config.hf_config, config.model_config.dtype, watchlist.model)
        self._served = served_model.compared(config, watchlist)
        served_model.check(self._served, watchlist, strict=self._settings.strict_model)
        self._geometry(watchlist.features, len(watchlist.hooks)).check()
        self._hooks = arming.arm(
            self._worker.model_runner.get_model(),
            watchlist,
            lambda rows: self._forward(self._worker, rows),
            max_rows=config.scheduler_config.max_num_batched_tokens,
            dtype=config.model_config.dtype,
            device=self._worker.device,
            between_layers=lone_forward.needs_embeddings(self._worker),
        )
        logger.info(
            "latentwatch: armed %d features at %s",
            len(watchlist.features),
            ", ".join(str(h.rows.hook_point) for h in self._hooks),
        )

    def _geometry(self, features: Sequence[Feature], hook_points: int) -> Geometry:
        scheduler = self._worker.vllm_config.scheduler_config
        return Geometry(
            max_requests=scheduler.max_num_seqs,
            max_rows=scheduler.max_num_batched_tokens,
            features=len(features),
            dense=sum(feature.dense for feature in features),
            hook_points=hook_points,
        )

    def _reports(self) -> bool:
        """One rank of an engine reports: the residual stream is the same on all tensor-parallel ranks."""
        return int(self._worker.rank) % int(self._worker.parallel_config.world_size) == 0

    def _or_disarmed(self, check: Callable[[], None]) -> None:
        """A check that raises has failed, whatever it raises: the model is served unwatched, and says why."""
        try:
            check()
        except Refusal as refusal:
            self._disarm(refusal)
        except Exception as error:
            # vLLM, the model and torch may raise anything here, and none of it may reach the engine (I4).
            logger.exception("latentwatch: %s raised", check.__name__.strip("_"))
            self._disarm(
                EngineRefused(
                    "a check at the start",
                    found=f"{check.__name__.strip('_')} raised {type(error).__name__}: {error}",
                    instead="The log has the traceback; report it with the model's name.",
                    reason=RefusalReason.CHECK_FAILED,
                )
            )

    def _disarm(self, refusal: Refusal) -> None:
        if self._worker.model_config.enforce_eager:
            for hook in self._hooks:
                hook.remove()
        self._hooks = ()
        self._refusal = refusal
        logger.error("latentwatch: NOT ARMED, the model is served unwatched: %s", refusal)

    # compile_or_warm_up_model: the graph that will run exists now.

    def _warmed_up(self, *_args: object, **_kwargs: object) -> None:
        if self._ring is None:
            return
        if self._hooks:
            self._or_disarmed(self._check_canary)
        self._or_disarmed(self._start_tap)
        if self._tap is None:
            self._start_tap()
        if self._exporter is not None:
            self._exporter.configure(self._exporter_config(self._ring, self._cache))
            self._exporter.watch()

    def _start_tap(self) -> None:
        assert self._ring is not None  # _warmed_up
        for hook in self._hooks:
            hook.reset()
        self._cache = self._followed_cache()
        self._tap = StepTap(self._ring, self._hooks, on_gpu=self._worker.device.type != "cpu", cache=self._cache)

    def _followed_cache(self) -> kv_cache.KvCache | None:
        """The KV cache whose hits inherit scores; None, with a line in the log, where it cannot be followed."""
        if not self._hooks:
            return None
        try:
            cache = kv_cache.followed(self._worker)
        except Exception:
            # Attributes of vLLM's that another version may lack: it costs inheritance, not the scores.
            logger.exception("latentwatch: the KV cache of this vLLM is not understood")
            cache = None
        if cache is None:
            logger.info("latentwatch: tokens from the prefix cache are counted as unseen, they inherit no scores")
        return cache

    def _check_canary(self) -> None:
        """Raises: EngineRefused: no forward since arming went through every armed op."""
        # An eager CPU engine warms nothing up. One dummy forward decides it, but not where it would wait for other
        # ranks, which make none: eager hooks run in any forward, and a step without their trace is booked as such.
        if self._silent() and self._worker.parallel_config.world_size == 1:
            self._worker.model_runner._dummy_run(1)
        elif self._worker.model_config.enforce_eager:
            return
        if self._silent():
            raise EngineRefused(
                "score op in the compiled graph",
                found="a forward left no trace in the score buffers: the graph that runs does not hold the op",
                instead="Delete vLLM's compile cache (VLLM_CACHE_ROOT) and start again; if that does not help, "
                "report it with the model's name.",
                reason=RefusalReason.CANARY_DEAD,
            )

    def _silent(self) -> bool:
        return any(float(hook.stat_T3[0, 0]) == UNWRITTEN for hook in self._hooks)

    # execute_model: the step path.

    def _stepped(self, scheduler_output: SchedulerOutput, *_args: object, **_kwargs: object) -> None:
        if self._tap is None:
            return
        self._tap.after_step(self._worker.model_runner, scheduler_output)
        if self._exporter is not None and self._exporter.was_restarted(time.monotonic()):
            self._tap.exporter_restarted()
        self._failures = 0

    # The exporter process.

    def _exporter_config(self, ring: Ring, cache: kv_cache.KvCache | None) -> ExporterConfig:
        config = self._worker.vllm_config
        watchlist = settings.load_watchlist(self._settings)
        features = watchlist.features if isinstance(watchlist, Watchlist) else ()
        return ExporterConfig(
            engine_pid=os.getpid(),
            ring_fd=ring.fd,
            geometry=ring.geometry,
            collector=self._settings.collector,
            drafts=config.speculative_config is not None,
            cached_reason=Reason.KV_CONNECTOR if kv_cache.has_kv_connector(config) else Reason.PREFIX_CACHE,
            cached_blocks=cache and CachedBlocks(cache.blocks, cache.block_size),
            features=tuple(_as_the_sender_sees_it(feature) for feature in features),
            identity=self._identity(watchlist.sha256 if self._hooks and isinstance(watchlist, Watchlist) else ""),
        )

    def _identity(self, watchlist_sha256: str) -> EngineIdentity:
        import vllm

        config = self._worker.vllm_config
        served = config.model_config.served_model_name
        engine = str(getattr(config.parallel_config, "data_parallel_index", config.parallel_config.data_parallel_rank))
        return EngineIdentity(
            replica=f"{self._settings.replica}/{engine}",
            boot_id=self._boot_id,
            engine=engine,
            model_name=served[0] if isinstance(served, list) else served,
            watchlist_sha256=watchlist_sha256,
            armed=bool(self._hooks),
            not_armed_reason=self._refusal.reason if self._refusal else "",
            not_armed_text=str(self._refusal or "")[:IDENTITY_TEXT_CHARACTERS],
            plugin_version=__version__,
            engine_version=vllm.__version__,
            model_match=self._served.match,
            model_text=self._served.text[:IDENTITY_TEXT_CHARACTERS],
        )

    def _shutting_down(self, *_args: object, **_kwargs: object) -> None:
        self._stop_exporter()

    def _stop_exporter(self) -> None:
        """Tell the exporter that nothing more comes; it drains by itself and is not waited for."""
        if self._ring is not None:
            self._ring.close()
        self._tap = None


def _check_engine(worker: Worker) -> None:
    """Refuse every mode in which rows could be attributed wrongly."""
    config, parallel = worker.vllm_config, worker.parallel_config
    pass_config = config.compilation_config.pass_config
    unsupported = {
        "speculative decoding": not _drafts_can_be_followed(config, worker.model_runner),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "micro-batching (DBO)": getattr(parallel, "use_ubatching", False),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "sequence-parallel MoE": getattr(parallel, "use_sequence_parallel_moe", False),
        "sequence parallelism": getattr(pass_config, "enable_sp", False),
        "KV-sharing fast prefill": getattr(config.cache_config, "kv_sharing_fast_prefill", False),
        "pooling models": config.model_config.runner_type == "pooling",
    }
    found = [mode for mode, on in unsupported.items() if on]
    missing = row_map.check_runner(worker.model_runner)
    if missing:
        found.append(f"a model runner without {missing}")
    if found:
        raise EngineRefused(
            "engine mode",
            found=f"{', '.join(found)}: rows of the batch cannot be attributed exactly there",
            instead="Serve without it, or without latentwatch; tokens are counted as unseen until then.",
            reason=RefusalReason.ENGINE_MODE,
        )


def _drafts_can_be_followed(config: VllmConfig, runner: ModelRunner) -> bool:
    """Whether the batch says where each request's rows truly begin, although some of them are drafts.

    With n-gram drafts and the scheduler in step it does. With a draft model or asynchronous scheduling the positions
    on the host assume that every draft is accepted.
    """
    speculative = config.speculative_config
    if speculative is None:
        return True
    in_step = not config.scheduler_config.async_scheduling
    return speculative.method == "ngram" and in_step and hasattr(runner, "input_batch")


def _as_the_sender_sees_it(feature: Feature) -> WatchedFeature:
    """A sparse feature without a limit of its own matters wherever it fires, a dense one without nowhere: a baseline
    may give it a limit at the collector, of which the engine knows nothing.
    """
    unlimited = math.inf if feature.dense else -math.inf
    return WatchedFeature(feature.severity, feature.limit.value if feature.limit else unlimited, feature.dense)
