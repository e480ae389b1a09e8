"""Errors that say what was asked, what was found and what to do instead.

Every refusal in the project is a `Refusal`: three sentences that an operator can act on, with the values
kept as attributes so that code (the wire, /metrics, tests) never parses prose.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class RefusalReason(StrEnum):
    """Why something was refused: a short stable slug for metrics, alerts and tests, and when it is given.

    The first part are those that a collector counts as streams or requests that it turned away; each has a series from
    the start, so that increase() sees the first one.
    """

    when: str
    counted: bool
    """Whether a collector counts it, in latentwatch_streams_refused_total."""

    def __new__(cls, slug: str, when: str, counted: bool = False) -> Self:
        member = str.__new__(cls, slug)
        member._value_ = slug
        member.when, member.counted = when, counted
        return member

    WATCHLIST_MISMATCH = "watchlist_mismatch", "an engine scores with another watchlist file than the collector's", True
    PROTOCOL_VERSION = "protocol_version", "the other end speaks another version of the protocol", True
    MALFORMED_HELLO = "malformed_hello", "a hello holds something that no collector accepts", True
    HELLO_MISSING = "hello_missing", "a stream began with something else, or said nothing", True
    HELLO_REPEATED = "hello_repeated", "a stream said hello twice", True
    MALFORMED_BATCH = "malformed_batch", "a batch or report does not parse, does not add up or means nothing", True
    SCORES_UNARMED = "scores_unarmed", "an engine that said it is not armed sends scores", True
    UNKNOWN_BOOT = "unknown_boot", "a batch came from a boot that never said hello", True
    BOOT_CHANGED = "boot_changed", "an engine boot names another model or engine than before", True
    REPLICA_NAME = "replica_name", "a text that becomes a label is empty, too long or not printable", True
    TOO_MANY_REPLICAS = "too_many_replicas", "the collector's bound on replicas is reached", True
    TOO_MANY_MODELS = "too_many_models", "the collector's bound on models or engines is reached", True
    TOO_MANY_STREAMS = "too_many_streams", "a bound on open streams is reached: the collector's or that of a peer", True
    SUPERSEDED = "superseded", "a newer stream of the same engine boot took the place of this one", True
    COLLECTOR_ERROR = "collector_error", "the collector failed on a message: a bug of its own", True
    UNAUTHENTICATED = "unauthenticated", "a stream shows no token that the collector knows", True
    REPLICA_IDENTITY = "replica_identity", "a certificate stands for another replica than the hello names", True
    MESSAGE_TOO_LARGE = "message_too_large", "a message is longer than either side may send", True
    REPLAYED = "replayed", "a batch came again that the sender was told is stored", True
    STREAM_IDLE = "stream_idle", "a welcomed stream sent no whole message for a minute", True
    REPLICA_TWICE = "replica_twice", "an engine streams here and is also told of by a collector that forwards", True
    FORWARDS_TWICE = "forwards_twice", "a collector that forwards was given reports of another one", True
    TOO_MANY_CONNECTIONS = "too_many_connections", "all places for TCP connections are taken, or all of a peer", True
    SLOW_HANDSHAKE = "slow_handshake", "a TLS handshake took too long", True
    CERTIFICATE = "certificate", "a peer showed no certificate, or one that is not accepted", True
    TLS_HANDSHAKE = "tls_handshake", "a TLS handshake failed otherwise", True
    SLOW_CONNECTION = "slow_connection", "a connection opened no stream in time", True
    HTTP_UNAUTHENTICATED = "http_unauthenticated", "an HTTP request shows no token that the collector knows", True
    HTTP_SLOW = "http_slow", "an HTTP request took too long to arrive, or its answer to be read", True
    HTTP_BUSY = "http_busy", "all places for HTTP connections are taken, or all of one peer", True
    HTTP_HOST = "http_host", "an HTTP request asks for a host that is no name of the collector", True
    HTTP_ORIGIN = "http_origin", "another site's page in a browser asks the collector", True
    HTTP_MALFORMED = "http_malformed", "an HTTP request is too large, ambiguous, or its body is no plain JSON", True

    ENDED = "ended", "a gateway ended a stream without saying why"
    MALFORMED_REPLY = "malformed_reply", "what a collector answered is no reply"
    RECORDING = "recording", "a recording is missing, damaged or not of steps"
    ADDRESS_UNUSABLE = "address_unusable", "an address cannot be listened on"
    PORT_IN_USE = "port_in_use", "another process listens on the port"
    SOCKET_IN_USE = "socket_in_use", "another process listens on the socket, or a file that is none is there"
    TARGET_INVALID = "target_invalid", "an address is no `host:port` and no `unix:///path`"
    TLS_UNUSABLE = "tls_unusable", "a certificate, its key or its authority cannot be used"
    TOKEN_UNUSABLE = "token_unusable", "a token's file cannot be read, is open to others or holds no token"
    EVIDENCE_TOKEN = "evidence_token", "the file of a token for evidence cannot be used"
    REQUEST_ID_KEY = "request_id_key", "the key for request ids cannot be used"
    CANARY_KEY = "canary_key", "the key of canary requests cannot be used"
    CANARY_PROMPTS = "canary_prompts", "the canary prompts cannot be used"
    CONFIG_FILE = "config_file", "a configuration file cannot be read"
    CONFIG_UNKNOWN = "config_unknown", "a configuration file has a name that is no option"
    CONFIG_MISSING = "config_missing", "an option that is needed was given nowhere"
    CONFIG_VALUE = "config_value", "an option or environment variable has a value that cannot be used"
    FORWARD = "forward", "the options of forwarding do not fit together"
    OTLP_ENDPOINT = "otlp_endpoint", "the OTLP endpoint cannot be used"
    OTLP_INTERVAL = "otlp_interval", "the OTLP interval cannot be used"
    PACKAGE_MISSING = "package_missing", "an optional package is not installed"
    FILE_EXISTS = "file_exists", "a file would be overwritten"
    OUT_EXISTS = "out_exists", "what --out names exists"
    UNREACHABLE = "unreachable", "an HTTP server does not answer as it should"
    RULES_MISSING = "rules_missing", "the alerting rules are not where they are installed"
    STATE_IN_USE = "state_in_use", "another collector uses the state's folder"
    STATE_UNUSABLE = "state_unusable", "the state's folder cannot be written"
    STATE_HEADER = "state_header", "the state is of another watchlist, format or bounds"
    STATE_DAMAGED = "state_damaged", "a checkpoint is damaged or does not fit"
    BASELINE_MISSING = "baseline_missing", "a baseline file cannot be read"
    BASELINE_FORMAT = "baseline_format", "a baseline is damaged or of another format"
    BASELINE_MISMATCH = "baseline_mismatch", "a baseline is of another model or watchlist"
    BASELINE_SOURCE = "baseline_source", "what a baseline is to be made of cannot be used"
    BASELINE_OVERLAP = "baseline_overlap", "baselines have windows in common that would count twice"
    BASELINE_VOLUME = "baseline_volume", "a baseline would rest on too few requests"
    LIMIT_FPR = "limit_fpr", "a limit's false-positive rate cannot be met with this baseline"
    EVIDENCE_FOLDER = "evidence_folder", "the evidence folder cannot be used"
    EVIDENCE_LOCKED = "evidence_locked", "another process writes to the evidence folder"
    EVIDENCE_RETENTION = "evidence_retention", "the bounds of evidence cannot be used"
    EVIDENCE_FORMAT = "evidence_format", "an evidence file is damaged or of another format"
    EVIDENCE_ID_AMBIGUOUS = "evidence_id_ambiguous", "an id to delete by is that of several requests"
    EVIDENCE_UNREADABLE = "evidence_unreadable", "evidence cannot be read"
    EVIDENCE_KEY = "evidence_key", "the key of sealed evidence is missing or cannot be used"
    EVIDENCE_DAMAGED = "evidence_damaged", "sealed evidence does not open with its key"
    CONTENT_LENGTH = "content_length", "a text is too long to be sealed"
    NAME_UNKNOWN = "name_unknown", "a feature or model is named that is not there"
    PLAIN_ADDRESS = "plain_address", "a collector would be open to the network without TLS or a token"
    AGE_INVALID = "age_invalid", "an age is no number of days or hours"
    ENGINE_MODE = "engine_mode", "the engine runs in a mode in which scores could not be attributed"
    CANARY_DEAD = "canary_dead", "the score op left no trace in the engine's first step"
    ARCHITECTURE_UNKNOWN = "architecture_unknown", "a model's layers are not where any known architecture has them"
    STREAM_UNPROVEN = "stream_unproven", "what is read at a hook point is not proven to be the residual stream"
    CHECK_FAILED = "check_failed", "a check at the engine's start raised an exception"
    MODEL_DTYPE = "model_dtype", "the model computes in a type that is not scored exactly"
    RING_GEOMETRY = "ring_geometry", "the shared-memory ring would not hold a step"
    RING_EVENTS = "ring_events", "the ring holds events that the engine of this version does not write"
    WATCHLIST_MISSING = "watchlist_missing", "no watchlist file was named, or it cannot be read"
    WATCHLIST_FORMAT = "watchlist_format", "a watchlist file is damaged or of another format"
    WATCHLIST_BUILD = "watchlist_build", "a watchlist cannot be built as it is written"
    WATCHLIST_DTYPE = "watchlist_dtype", "a watchlist was built for another type than the model's"
    WATCHLIST_MODEL = "watchlist_model", "a watchlist was built for another model"
    WATCHLIST_WIDTH = "watchlist_width", "a watchlist's rows have another width than the model's stream"
    HOOK_POINT_UNKNOWN = "hook_point_unknown", "a hook point is none that the engine can tap"
    YAML_MISSING = "yaml_missing", "the YAML file is not there"
    YAML_SYNTAX = "yaml_syntax", "the YAML file does not parse"
    YAML_SCHEMA = "yaml_schema", "the YAML file says something that the schema does not allow"
    AGAINST_MISSING = "against_missing", "--activations was given without --against"
    TOO_FEW_REQUESTS = "too_few_requests", "a statistic would rest on too few requests"
    SOURCE_FILE = "source_file", "a source's file is missing or damaged"
    SOURCE_PACKAGE = "source_package", "a source needs a package that is not installed"
    SOURCE_OPTION = "source_option", "a source has an option that is not known or not supported"
    SOURCE_NUMBERS = (
        "source_numbers",
        "a source's numbers are not finite, or not what its other files or its own library say",
    )
    SOURCE_UNKNOWN = "source_unknown", "a source's file has a key or tensor that its reader does not know"
    SOURCE_PLACE_MISSING = "source_place_missing", "a source does not say what place of the model it was trained on"
    SOURCE_HOOK_POINT = "source_hook_point", "a source is of another hook point than the one named"
    SOURCE_ARCHITECTURE = "source_architecture", "a source is of an architecture that is not scored exactly"
    SOURCE_SCALE_MISSING = "source_scale_missing", "a source does not say by what its input was scaled"
    SOURCE_TOPK = "source_topk", "a TopK source needs a gate that was calibrated"
    DEMO_ASSETS_MISSING = "demo_assets_missing", "the demo's assets are not where they are installed"
    DEMO_BUILD_EXTRA = "demo_build_extra", "the packages that build the demo are not installed"
    DEMO_PROMPTS = "demo_prompts", "the demo's prompts cannot be used"
    MODEL_FILE = "model_file", "a model's file is missing, damaged or of a kind that cannot be converted"
    VLLM_MISSING = "vllm_missing", "vLLM is not installed"
    NO_ANSWER = "no_answer", "a server did not answer a request of the demo"
    CHILD_FAILED = "child_failed", "a process that was started ended or did not come up"


class Refusal(Exception):
    """Input that cannot be used. Its text is one line that any log, terminal or message can hold: what, found, instead.

    Bytes that are no text and characters that move a cursor are escaped, since much of it is what others wrote.

    what:    what was asked for, or which input was read ("watchlist /etc/lw/prod.safetensors").
    found:   what is wrong with it, with the offending value.
    instead: what to do now.
    reason:  a RefusalReason; what another version says over the wire may be one that is not known here.
    """

    def __init__(self, what: str, *, found: str, instead: str, reason: str) -> None:
        self.what, self.found, self.instead = map(_in_one_line, (what, found, instead))
        super().__init__(f"{self.what}: {self.found}. {self.instead}")
        self.reason = str(reason)


def _in_one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class WatchlistRefused(Refusal):
    """A watchlist file, YAML or source that cannot be loaded exactly."""


class EngineRefused(Refusal):
    """An engine configuration in which scores could not be attributed exactly."""


class StreamRefused(Refusal):
    """A stream or message that the collector does not accept."""


class StateRefused(Refusal):
    """State on disk that a collector cannot resume from."""


class ConfigRefused(Refusal):
    """A command line, environment variable or configuration value that cannot be used."""


class BaselineRefused(Refusal):
    """A baseline that is missing, damaged, too small, or of another model or watchlist."""
