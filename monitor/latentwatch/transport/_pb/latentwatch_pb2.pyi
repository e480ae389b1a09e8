from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamRequest(_message.Message):
    __slots__ = ("hello", "batch", "report")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    batch: StepBatch
    report: Report
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., batch: _Optional[_Union[StepBatch, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class StreamReply(_message.Message):
    __slots__ = ("welcome", "ack", "refusal")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    ack: Ack
    refusal: Refusal
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "replica", "boot_id", "engine", "model_name", "watchlist_sha256", "armed", "not_armed_reason", "not_armed_text", "plugin_version", "engine_version", "last_acked_sequence", "time_unix_nano", "model_match", "model_text", "forwards")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    WATCHLIST_SHA256_FIELD_NUMBER: _ClassVar[int]
    ARMED_FIELD_NUMBER: _ClassVar[int]
    NOT_ARMED_REASON_FIELD_NUMBER: _ClassVar[int]
    NOT_ARMED_TEXT_FIELD_NUMBER: _ClassVar[int]
    PLUGIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_ACKED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_NANO_FIELD_NUMBER: _ClassVar[int]
    MODEL_MATCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_TEXT_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    replica: str
    boot_id: str
    engine: str
    model_name: str
    watchlist_sha256: str
    armed: bool
    not_armed_reason: str
    not_armed_text: str
    plugin_version: str
    engine_version: str
    last_acked_sequence: int
    time_unix_nano: int
    model_match: str
    model_text: str
    forwards: bool
    def __init__(self, protocol: _Optional[int] = ..., replica: _Optional[str] = ..., boot_id: _Optional[str] = ..., engine: _Optional[str] = ..., model_name: _Optional[str] = ..., watchlist_sha256: _Optional[str] = ..., armed: bool = ..., not_armed_reason: _Optional[str] = ..., not_armed_text: _Optional[str] = ..., plugin_version: _Optional[str] = ..., engine_version: _Optional[str] = ..., last_acked_sequence: _Optional[int] = ..., time_unix_nano: _Optional[int] = ..., model_match: _Optional[str] = ..., model_text: _Optional[str] = ..., forwards: bool = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("resume_after_sequence", "collector_id")
    RESUME_AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COLLECTOR_ID_FIELD_NUMBER: _ClassVar[int]
    resume_after_sequence: int
    collector_id: str
    def __init__(self, resume_after_sequence: _Optional[int] = ..., collector_id: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "what", "found", "instead")
    REASON_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    INSTEAD_FIELD_NUMBER: _ClassVar[int]
    reason: str
    what: str
    found: str
    instead: str
    def __init__(self, reason: _Optional[str] = ..., what: _Optional[str] = ..., found: _Optional[str] = ..., instead: _Optional[str] = ...) -> None: ...

class StepBatch(_message.Message):
    __slots__ = ("sequence", "step", "time_unix_nano", "segments", "fires", "dense", "norm", "dense_features", "hook_points", "opened", "closed", "counters")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_NANO_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    FIRES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    DENSE_FEATURES_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    step: int
    time_unix_nano: int
    segments: bytes
    fires: bytes
    dense: bytes
    norm: bytes
    dense_features: int
    hook_points: int
    opened: _containers.RepeatedCompositeFieldContainer[RequestOpened]
    closed: _containers.RepeatedCompositeFieldContainer[RequestClosed]
    counters: EngineCounters
    def __init__(self, sequence: _Optional[int] = ..., step: _Optional[int] = ..., time_unix_nano: _Optional[int] = ..., segments: _Optional[bytes] = ..., fires: _Optional[bytes] = ..., dense: _Optional[bytes] = ..., norm: _Optional[bytes] = ..., dense_features: _Optional[int] = ..., hook_points: _Optional[int] = ..., opened: _Optional[_Iterable[_Union[RequestOpened, _Mapping]]] = ..., closed: _Optional[_Iterable[_Union[RequestClosed, _Mapping]]] = ..., counters: _Optional[_Union[EngineCounters, _Mapping]] = ...) -> None: ...

class RequestOpened(_message.Message):
    __slots__ = ("handle", "request_id", "prompt_tokens", "adapter", "traceparent", "response_id")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_ID_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    prompt_tokens: int
    adapter: str
    traceparent: str
    response_id: str
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., adapter: _Optional[str] = ..., traceparent: _Optional[str] = ..., response_id: _Optional[str] = ...) -> None: ...

class RequestClosed(_message.Message):
    __slots__ = ("handle", "request_id", "prompt_tokens", "output_tokens", "total_tokens", "outcome", "response_id")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_ID_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    prompt_tokens: int
    output_tokens: int
    total_tokens: int
    outcome: int
    response_id: str
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., outcome: _Optional[int] = ..., response_id: _Optional[str] = ...) -> None: ...

class EngineCounters(_message.Message):
    __slots__ = ("steps", "ring_dropped_steps", "op_silent_steps", "recomputed_tokens", "surplus_tokens", "exporter_restarts", "shed_batches", "reconnects", "unattributed_rows", "unannounced_requests", "untraced_requests", "shed_critical_tokens", "shed_warning_tokens", "lost_tokens", "spool_bytes", "spool_failures", "spool_refused")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RING_DROPPED_STEPS_FIELD_NUMBER: _ClassVar[int]
    OP_SILENT_STEPS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SURPLUS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPORTER_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    SHED_BATCHES_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    UNATTRIBUTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    UNANNOUNCED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    UNTRACED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SHED_CRITICAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHED_WARNING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPOOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPOOL_FAILURES_FIELD_NUMBER: _ClassVar[int]
    SPOOL_REFUSED_FIELD_NUMBER: _ClassVar[int]
    steps: int
    ring_dropped_steps: int
    op_silent_steps: int
    recomputed_tokens: int
    surplus_tokens: int
    exporter_restarts: int
    shed_batches: int
    reconnects: int
    unattributed_rows: int
    unannounced_requests: int
    untraced_requests: int
    shed_critical_tokens: int
    shed_warning_tokens: int
    lost_tokens: int
    spool_bytes: int
    spool_failures: int
    spool_refused: int
    def __init__(self, steps: _Optional[int] = ..., ring_dropped_steps: _Optional[int] = ..., op_silent_steps: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., surplus_tokens: _Optional[int] = ..., exporter_restarts: _Optional[int] = ..., shed_batches: _Optional[int] = ..., reconnects: _Optional[int] = ..., unattributed_rows: _Optional[int] = ..., unannounced_requests: _Optional[int] = ..., untraced_requests: _Optional[int] = ..., shed_critical_tokens: _Optional[int] = ..., shed_warning_tokens: _Optional[int] = ..., lost_tokens: _Optional[int] = ..., spool_bytes: _Optional[int] = ..., spool_failures: _Optional[int] = ..., spool_refused: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("sequence", "time_unix_nano", "replicas", "engines", "models", "requests", "shed_requests", "shed_crossings")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_NANO_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SHED_CROSSINGS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time_unix_nano: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaState]
    engines: _containers.RepeatedCompositeFieldContainer[EngineDelta]
    models: _containers.RepeatedCompositeFieldContainer[ModelDelta]
    requests: _containers.RepeatedCompositeFieldContainer[RequestRow]
    shed_requests: int
    shed_crossings: int
    def __init__(self, sequence: _Optional[int] = ..., time_unix_nano: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaState, _Mapping]]] = ..., engines: _Optional[_Iterable[_Union[EngineDelta, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelDelta, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[RequestRow, _Mapping]]] = ..., shed_requests: _Optional[int] = ..., shed_crossings: _Optional[int] = ...) -> None: ...

class ReplicaState(_message.Message):
    __slots__ = ("hello", "connected", "last_seen_seconds", "open_requests", "counters")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    connected: bool
    last_seen_seconds: float
    open_requests: int
    counters: EngineCounters
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., connected: bool = ..., last_seen_seconds: _Optional[float] = ..., open_requests: _Optional[int] = ..., counters: _Optional[_Union[EngineCounters, _Mapping]] = ...) -> None: ...

class EngineDelta(_message.Message):
    __slots__ = ("model_name", "engine", "tokens", "requests")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    engine: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    requests: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model_name: _Optional[str] = ..., engine: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., requests: _Optional[_Iterable[int]] = ...) -> None: ...

class ModelDelta(_message.Message):
    __slots__ = ("model_name", "fired", "requests", "exceedances", "statistic", "statistic_sum", "norm", "norm_sum", "peak")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    FIRED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    EXCEEDANCES_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_SUM_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    NORM_SUM_FIELD_NUMBER: _ClassVar[int]
    PEAK_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    fired: _containers.RepeatedScalarFieldContainer[int]
    requests: _containers.RepeatedScalarFieldContainer[int]
    exceedances: _containers.RepeatedScalarFieldContainer[int]
    statistic: _containers.RepeatedScalarFieldContainer[int]
    statistic_sum: _containers.RepeatedScalarFieldContainer[float]
    norm: _containers.RepeatedScalarFieldContainer[int]
    norm_sum: _containers.RepeatedScalarFieldContainer[float]
    peak: bytes
    def __init__(self, model_name: _Optional[str] = ..., fired: _Optional[_Iterable[int]] = ..., requests: _Optional[_Iterable[int]] = ..., exceedances: _Optional[_Iterable[int]] = ..., statistic: _Optional[_Iterable[int]] = ..., statistic_sum: _Optional[_Iterable[float]] = ..., norm: _Optional[_Iterable[int]] = ..., norm_sum: _Optional[_Iterable[float]] = ..., peak: _Optional[bytes] = ...) -> None: ...

class RequestRow(_message.Message):
    __slots__ = ("number", "replica", "model_name", "engine", "request_id", "adapter", "traceparent", "opened_seconds", "opening_seen", "outcome", "closed_seconds", "prompt_tokens", "output_tokens", "total_tokens", "tokens", "features", "crossings", "response_id")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    OPENED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OPENING_SEEN_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CLOSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CROSSINGS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_ID_FIELD_NUMBER: _ClassVar[int]
    number: int
    replica: str
    model_name: str
    engine: str
    request_id: str
    adapter: str
    traceparent: str
    opened_seconds: float
    opening_seen: bool
    outcome: int
    closed_seconds: float
    prompt_tokens: int
    output_tokens: int
    total_tokens: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    features: bytes
    crossings: bytes
    response_id: str
    def __init__(self, number: _Optional[int] = ..., replica: _Optional[str] = ..., model_name: _Optional[str] = ..., engine: _Optional[str] = ..., request_id: _Optional[str] = ..., adapter: _Optional[str] = ..., traceparent: _Optional[str] = ..., opened_seconds: _Optional[float] = ..., opening_seen: bool = ..., outcome: _Optional[int] = ..., closed_seconds: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., features: _Optional[bytes] = ..., crossings: _Optional[bytes] = ..., response_id: _Optional[str] = ...) -> None: ...
