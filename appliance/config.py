"""The measured configuration: one TOML file, decoded strictly into frozen values.

The field declarations below are the manual: every field has a unit in its name or description,
a bound and a default where a sane one exists. An unknown key is an error that names the key and
the nearest known one. Nothing here reads the environment.

Relative paths are taken from the folder that holds the configuration file, so that a file means
the same wherever the process was started.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from appliance.errors import ConfigError

Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=86_400)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Sha256Hex: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Sha256Digest: TypeAlias = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
CredentialName: TypeAlias = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})?\Z")]
Section = TypeVar("Section", bound=Struct)
Svn: TypeAlias = Annotated[int, Meta(ge=0, le=255)]

# What makes SGLang log or dump content, listen elsewhere, hand its cache or its requests to another
# process, or run code and load weights that were not measured. A name is
# refused when it is a prefix of one of these or the other way round, because argparse accepts
# any unambiguous abbreviation of a long option.
REFUSED_ENGINE_ARGUMENTS = frozenset(
    {
        "config",
        "crash-dump-folder",
        "custom-sigquit-handler",
        "custom-weight-loader",
        "debug-tensor-dump",
        "decoupled-spec",
        "disaggregation",
        "enable-custom-logit-processor",
        "enable-return-hidden-states",
        "enable-trace",
        "encoder-register-urls",
        "encoder-urls",
        "export-metrics-to-file",
        "fastapi-root-path",
        "file-storage-path",
        "forward-hooks",
        "gated-launch-port",
        "grpc-http-sidecar-port",
        "grpc-mode",
        "grpc-port",
        "hicache-storage-backend",
        "kv-events-config",
        "load-publish-endpoint",
        "log-level",
        "log-requests",
        "modelexpress-config",
        "msprobe-dump-config",
        "otlp-traces-endpoint",
        "remote-instance-weight-loader",
        "sidecar",
        "smg-grpc-mode",
        "smg-http-sidecar-port",
        "spec-trace-dir",
        "ssl-certfile",
        "ssl-keyfile",
        "tool-server",
        "trust-remote-code",
        "trust-request-chat-template",
        "unified-cache-external-linker",
        "use-ray",
        "weight-cache",
    }
)

# Request keys that reach into the engine; no configuration may let a client send one.
REFUSED_REQUEST_KEYS = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "cache_salt",
        "custom_labels",
        "custom_logit_processor",
        "custom_params",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "extra_key",
        "input_ids",
        "lora_path",
        "priority",
        "rid",
        "routed_dp_rank",
        "session_id",
        "session_params",
        "watermark",
    }
)


class Listen(Struct, frozen=True, forbid_unknown_fields=True):
    """`[listen]`: the public port and the local status socket.

    Attributes:
        host: address to bind; a literal IP address.
        port: TCP port; 0 takes a free one (tests).
        status_socket: Unix socket that `dcv status` reads, mode 0600.
        metrics_port: TCP port on loopback for `GET /metrics`; null serves none, 0 takes a free one.
    """

    host: str = "127.0.0.1"
    port: Port = 8443
    status_socket: str = "status.sock"
    metrics_port: Port | None = None


class Tls(Struct, frozen=True, forbid_unknown_fields=True):
    """`[tls]`: the certificate around the key that is born at boot.

    Attributes:
        names: DNS names and IP addresses of the self-signed certificate and of `dcv csr`.
        certificate_file: where its PEM is written for clients to trust; not the key, which never
            leaves memory. Empty writes none.
        chain_file: PEM of your certificate for the appliance's key (`dcv csr`) and what it needs
            up to its authority, in this order; shown instead of the self-signed certificate as
            soon as it is there and fits. Empty looks for none.
        chain_interval_s: how often `chain_file` is looked at.
        client_ca_file: PEM of certificate authorities; when set, every connection needs a client
            certificate from one of them, also for `/health`. Read once, at boot.
    """

    names: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=32)] = (
        "localhost",
        "127.0.0.1",
        "::1",
    )
    certificate_file: str = ""
    chain_file: str = ""
    chain_interval_s: Seconds = 5.0
    client_ca_file: str = ""


class ApiKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `[auth] keys`, as `dcv keys new NAME` prints it.

    Attributes:
        name: for the operator; unique.
        sha256: of the key; the key itself is nowhere.
        max_concurrent: generations at once, waiting ones included; null for no bound of its own.
        requests_per_minute: sustained rate, a minute's worth may come at once; null for none. Every
            request counts, what is refused as invalid too, tokenize and detokenize too.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    sha256: Sha256Hex
    max_concurrent: Count | None = None
    requests_per_minute: Count | None = None


class Auth(Struct, frozen=True, forbid_unknown_fields=True):
    """`[auth]`: who may ask.

    Attributes:
        mode: `keys` asks every client for an API key; `loopback` asks none and is refused unless
            the appliance listens on loopback only; `unsafe_none` asks none, wherever it listens.
        keys: the known keys, as hashes.
    """

    mode: Literal["keys", "loopback", "unsafe_none"] = "keys"
    keys: Annotated[tuple[ApiKey, ...], Meta(max_length=10_000)] = ()


class Operator(Struct, frozen=True, forbid_unknown_fields=True):
    """`[operator]`: what `dcv serve --operator-input FILE` may add to this file, whose author and
    whose operator need not be the same. Limits it may always lower; nothing else.

    Attributes:
        max_keys: API keys it may add, where [auth] mode is `keys`; these keys may then be the only
            ones.
        domains: it may replace [tls] names by names that are one of these or below one; `*` allows
            any name and address.
        chain_file: whether it may say where [tls] chain_file is, if that is not said here.
        credentials: whether it may name the credentials with vendors' keys that are not named here.
    """

    max_keys: Annotated[int, Meta(ge=0, le=10_000)] = 0
    domains: Annotated[tuple[Name, ...], Meta(max_length=32)] = ()
    chain_file: Literal["refused", "accepted"] = "refused"
    credentials: Literal["refused", "accepted"] = "refused"


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """`[limits]`: every bound on what a client may take. Durations in seconds, sizes in bytes.

    Attributes:
        max_body_bytes: request body.
        max_body_bytes_total: bodies of all requests together, from their arrival until the answer
            begins. One key, or address without a key, gets three quarters of it at most; over it,
            who holds most is refused first. What a body is parsed into takes several times its
            size, while the request waits and is forwarded.
        max_response_bytes: one non-streamed engine answer, held in memory.
        max_event_bytes: one SSE event of the engine.
        max_nesting: depth of a JSON body.
        max_json_values: strings, commas and opening brackets of a JSON body, about the number of its
            values. A prompt of token ids has one for each.
        max_concurrent: engine generations at once; `n` choices count as `n`. Where there are several
            keys, one alone gets 15 of 16.
        max_waiting: requests in line for a place; over it the key with most of them, and of running
            ones, is refused its newest.
        max_wait_s: how long one waits in line.
        max_choices: `n` times the number of prompts of one request.
        max_connections: open TCP connections; one more is closed before its handshake.
        max_connections_per_peer: the same, from one address.
        reports_per_minute: attestation reports and GPU evidence that one address may ask for.
        handshake_s: TLS handshake.
        header_s: the head of a request, from its first byte; on HTTP/2 the preface too.
        idle_s: a connection without a request in progress.
        body_s: the whole request body.
        write_s: one write to a client that does not read.
        heartbeat_s: silence in a stream after which `: ping` is sent.
        checkpoint_s: between two signed checkpoints of a stream that asks for them.
        engine_first_event_s: from forwarding to the engine's first byte (queueing included).
        engine_idle_s: between two reads from the engine once it has begun to answer.
        generation_s: a whole answer that is not streamed: the engine is silent until its end.
        drain_s: how long running exchanges may go on after SIGTERM.
    """

    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30)] = 8 << 20
    max_body_bytes_total: Annotated[int, Meta(ge=1024, le=1 << 40)] = 256 << 20
    max_response_bytes: Annotated[int, Meta(ge=1024, le=1 << 30)] = 64 << 20
    max_event_bytes: Annotated[int, Meta(ge=1024, le=1 << 28)] = 4 << 20
    max_nesting: Annotated[int, Meta(ge=4, le=256)] = 64
    max_json_values: Annotated[int, Meta(ge=1024, le=1 << 26)] = 1 << 19
    max_concurrent: Count = 256
    max_waiting: Annotated[int, Meta(ge=0, le=1_000_000)] = 1024
    max_wait_s: Seconds = 30.0
    max_choices: Annotated[int, Meta(ge=1, le=128)] = 16
    max_connections: Count = 4096
    max_connections_per_peer: Count = 1024
    reports_per_minute: Count = 240
    handshake_s: Seconds = 10.0
    header_s: Seconds = 15.0
    idle_s: Seconds = 75.0
    body_s: Seconds = 60.0
    write_s: Seconds = 20.0
    heartbeat_s: Seconds = 15.0
    checkpoint_s: Seconds = 10.0
    engine_first_event_s: Seconds = 600.0
    engine_idle_s: Seconds = 120.0
    generation_s: Seconds = 3600.0
    drain_s: Seconds = 30.0


class Engine(Struct, frozen=True, forbid_unknown_fields=True):
    """`[engine]`: SGLang, as a supervised child. Durations in seconds.

    Attributes:
        python: interpreter of the engine's own environment.
        version: the SGLang release of that environment, as the lock pins it.
        runtime_dir: private folder for the settings file and the init file; made 0700.
        python_path: folders put on the engine's PYTHONPATH (what it needs without a GPU).
        device: where it computes.
        dtype: number format of weights and activations.
        attention_backend: `fa3` on Hopper, `torch_native` on a CPU.
        deterministic: batch-invariant kernels and seeded sampling.
        random_seed: the server-wide seed.
        tensor_parallel, data_parallel: GPUs per replica, replicas.
        context_length: tokens; null takes the model's own.
        memory_fraction: of the device's memory for weights and KV cache; null lets it choose, and is half
            on a CPU.
        max_running_requests, max_total_tokens: scheduler bounds; null lets it choose.
        stream_interval: tokens per streamed event.
        tool_call_parser, reasoning_parser: SGLang's names of what turns this model's own notation
            into tool calls and reasoning content; empty leaves both in the text.
        nodes, node_rank, coordinator: multi-node; `coordinator` is host:port of rank 0.
        extra_args: more SGLang options, `name=value` or `name` for a flag; may not override ours.
        extra_request_keys: request keys that clients may send beyond the allow-list.
        ready_deadline_s: from start to ready; the default fits 70B weights from a slow disk.
        stop_grace_s: from SIGTERM to SIGKILL.
        health_interval_s, health_deadline_s, health_failures: a generation probe this often,
            each this long; so many failures in a row mean the engine hangs.
        unsafe_command: run this program instead of SGLang (tests, development): what it computes
            is not SGLang's, so no policy but a named unsafe one will ever accept it.
    """

    python: str = ""
    version: Name = "0.5.23"
    runtime_dir: str = "engine"
    python_path: tuple[str, ...] = ()
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    attention_backend: Name = "fa3"
    deterministic: bool = True
    random_seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 1
    tensor_parallel: Annotated[int, Meta(ge=1, le=64)] = 1
    data_parallel: Annotated[int, Meta(ge=1, le=64)] = 1
    context_length: Count | None = None
    memory_fraction: Annotated[float, Meta(ge=0.01, lt=1)] | None = None
    max_running_requests: Count | None = None
    max_total_tokens: Annotated[int, Meta(ge=1)] | None = None
    stream_interval: Annotated[int, Meta(ge=1, le=1024)] = 1
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    nodes: Annotated[int, Meta(ge=1, le=64)] = 1
    node_rank: Annotated[int, Meta(ge=0, le=63)] = 0
    coordinator: str = ""
    extra_args: tuple[Name, ...] = ()
    extra_request_keys: tuple[Name, ...] = ()
    ready_deadline_s: Seconds = 1800.0
    stop_grace_s: Seconds = 30.0
    health_interval_s: Seconds = 15.0
    health_deadline_s: Seconds = 30.0
    health_failures: Annotated[int, Meta(ge=1, le=100)] = 3
    unsafe_command: tuple[str, ...] = ()


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """`[model]`: what is served.

    Attributes:
        id: the name clients ask for.
        path: folder with the weights, the tokenizer and the chat template.
        revision: the publisher's name for these weights; null when unknown.
        files: sha256 of every file below `path`, checked at every start. A file that is not
            listed, or listed and missing, is refused.
        max_model_len: tokens a request may span, told to clients; null when unknown.
        task: `generate` texts, or `embed` them; the engine does one of the two.
    """

    id: Name
    path: str
    files: dict[str, Sha256Hex]
    revision: str | None = None
    max_model_len: Count | None = None
    task: Literal["generate", "embed"] = "generate"


CREDENTIAL_URLS = {
    "nvidia_service_key": ("rim_url", "ocsp_url", "nras_url"),
    "intel_pcs_key": ("pcs_url",),
}
"""Keys of `[attestation]` that name a credential, and those that say where it is sent."""

TeeType: TypeAlias = Literal["sev_snp", "tdx", "azure_vtpm", "tpm2", "unsafe_simulated"]


class TcbFloor(Struct, frozen=True, forbid_unknown_fields=True):
    """`[policy.minimum_tcb]`: AMD's security version numbers, each at least this.

    Attributes:
        fmc: Turin and later; not asked of earlier ones, which have none.
        bootloader, tee, snp, microcode: as in the report's REPORTED_TCB.
    """

    fmc: Svn = 0
    bootloader: Svn = 0
    tee: Svn = 0
    snp: Svn = 0
    microcode: Svn = 0


class Policy(Struct, frozen=True, forbid_unknown_fields=True):
    """`[policy]`: what evidence must say. The appliance holds itself to this table before it
    serves; `dcv verify --policy FILE` reads one too, the relying party's own.

    Attributes:
        tee_types: of the CPU evidence. `tpm2` and `unsafe_simulated` protect no memory and are at
            best a warning.
        gpus: `unsafe_simulated` accepts evidence under the published test root, as a warning;
            `unsafe_none` accepts an appliance without GPUs.
        min_gpus: so many GPUs at least; not asked where `gpus` is `unsafe_none`.
        gpu_architectures: chips by NVIDIA's name.
        gpu_drivers, gpu_vbios: exact versions; empty accepts any whose reference values match.
        revocation: what an answer about a certificate's revocation is that is missing or out of
            its time. A certificate that is known to be revoked is never accepted.
        expired_rims: what reference values are whose signer's certificate has expired.
        snp_products: AMD's product lines that are accepted.
        minimum_tcb: the floor of SEV-SNP's security versions.
        vmpl: privilege levels that may have asked for a SEV-SNP report.
        tdx_statuses: Intel's TCB statuses that are accepted without a finding.
        secure_boot: of machines that claim it (Azure).
        images: digests of UKIs that are accepted; empty accepts any in the reference values.
        models: digests of models that are accepted; empty accepts any.
        engine_settings: digests of engine settings that are accepted; empty accepts any.
        deterministic: `required` refuses an engine whose settings are not deterministic.
    """

    tee_types: tuple[TeeType, ...] = ("sev_snp", "tdx", "azure_vtpm")
    gpus: Literal["nvidia", "unsafe_simulated", "unsafe_none"] = "nvidia"
    min_gpus: Annotated[int, Meta(ge=1, le=16)] = 1
    gpu_architectures: tuple[Name, ...] = ("GH100",)
    gpu_drivers: tuple[Name, ...] = ()
    gpu_vbios: tuple[Name, ...] = ()
    revocation: Literal["required", "warn"] = "warn"
    expired_rims: Literal["refuse", "warn"] = "refuse"
    snp_products: tuple[Literal["Milan", "Genoa", "Turin"], ...] = ("Milan", "Genoa", "Turin")
    minimum_tcb: TcbFloor = TcbFloor()
    vmpl: tuple[Annotated[int, Meta(ge=0, le=3)], ...] = (0,)
    tdx_statuses: tuple[Name, ...] = ("UpToDate",)
    secure_boot: Literal["required", "unsafe_any"] = "required"
    images: tuple[Sha256Digest, ...] = ()
    models: tuple[Sha256Digest, ...] = ()
    engine_settings: tuple[Sha256Digest, ...] = ()
    deterministic: Literal["required", "any"] = "any"


class Attestation(Struct, frozen=True, forbid_unknown_fields=True):
    """`[attestation]`: how this machine proves itself. Durations in seconds.

    Attributes:
        cpu: what the CPU evidence is; it must be there, nothing is probed for.
        gpu: what the GPU evidence is. `unsafe_none` runs without.
        gpu_count: GPUs that must be there.
        attester_socket: Unix socket of the collector; empty starts `dcv attester` as a child.
        image_digest_file: holds `sha256:…` of the UKI that was booted; version, commit and the root's
            hash are then read from os-release and the kernel's command line. Empty without an image.
        tsm_dir: where configfs-tsm is mounted.
        tpm: `device:PATH` or `swtpm:host=HOST,port=PORT`, as tpm2-tools spell a TCTI.
        tpm_ak_handle, tpm_ak_certificate_index: persistent handle of the attestation key, NV index
            of its certificate (`tpm2`; the defaults are Google's, for RSA keys).
        tpm_roots_file: PEM of the vendor roots that the AK certificate must lead to (`tpm2`).
        storage_key_file: holds the public part of the TPM's storage key, for those who seal secrets to
            this machine; shown at `/.well-known/dcv/storage-key`. Empty shows none.
        collect_s: one collection of evidence, all GPUs, and its appraisal.
        interval_s: between re-attestations while serving; each is up to a tenth later.
        failures: collections that may fail in a row before the appliance withdraws.
        endorsements_dir: cache of what vendors vouch for; may hold files put there in advance.
        endorsements: `offline` never asks a vendor.
        rim_dirs: folders with reference values that came with the image.
        rim_url, ocsp_url, nras_url, kds_url, pcs_url, imds_url: where vendors answer.
        nvidia_service_key: the credential that holds the key of NVIDIA's attestation services, sent to
            `rim_url`, `ocsp_url` and `nras_url`, which must then be https. Empty sends none.
        intel_pcs_key: the same with Intel's subscription key and `pcs_url`.
        endorsement_s: one question to a vendor.
        nvidia_sdk: NVIDIA's own verifier at boot: not asked, asked and recorded, or must agree.
        nvidia_sdk_python: interpreter of its own environment.
        nvidia_sdk_mode: `local` verifies here, `remote` asks NVIDIA's service (NRAS).
        nvidia_sdk_s: its whole run.
        keyset_s: how long a keyset is valid.
        unsafe_max_evidence_age_s: a request may use GPU evidence up to this old; 0 never. Its
            receipt is then `unbound` to every verifying client, `dcv` among them, by any policy.
        simulated_latency_s: of the simulated GPU's report.
        simulated_fault: what the simulated hardware does wrong; `none` nothing.
    """

    cpu: Literal["tdx", "sev_snp", "azure_vtpm", "tpm2", "simulated"]
    gpu: Literal["nvidia", "simulated", "unsafe_none"] = "nvidia"
    gpu_count: Annotated[int, Meta(ge=1, le=16)] = 1
    attester_socket: str = ""
    image_digest_file: str = ""
    tsm_dir: str = "/sys/kernel/config/tsm/report"
    tpm: str = "device:/dev/tpmrm0"
    tpm_ak_handle: Annotated[int, Meta(ge=0x81000000, le=0x81FFFFFF)] = 0x81010001
    tpm_ak_certificate_index: Annotated[int, Meta(ge=0x01000000, le=0x01FFFFFF)] = 0x01C10000
    tpm_roots_file: str = ""
    storage_key_file: str = ""
    collect_s: Seconds = 30.0
    interval_s: Seconds = 60.0
    failures: Annotated[int, Meta(ge=1, le=100)] = 3
    endorsements_dir: str = "endorsements"
    endorsements: Literal["online", "offline"] = "online"
    rim_dirs: tuple[str, ...] = ()
    rim_url: str = "https://rim.attestation.nvidia.com/v1/rim"
    ocsp_url: str = "https://ocsp.ndis.nvidia.com"
    nras_url: str = "https://nras.attestation.nvidia.com/v3/attest/gpu"
    kds_url: str = "https://kdsintf.amd.com"
    pcs_url: str = "https://api.trustedservices.intel.com"
    imds_url: str = "http://169.254.169.254"
    nvidia_service_key: CredentialName = ""
    intel_pcs_key: CredentialName = ""
    endorsement_s: Seconds = 10.0
    nvidia_sdk: Literal["off", "record", "require"] = "off"
    nvidia_sdk_python: str = ""
    nvidia_sdk_mode: Literal["local", "remote"] = "local"
    nvidia_sdk_s: Seconds = 120.0
    keyset_s: Annotated[float, Meta(gt=60, le=86_400)] = 86_400.0
    unsafe_max_evidence_age_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    simulated_latency_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    simulated_fault: str = "none"


class Receipts(Struct, frozen=True, forbid_unknown_fields=True):
    """`[receipts]`: what is kept of exchanges. A receipt holds digests, never a prompt or an answer.

    Attributes:
        dir: folder of the database; made 0700. On an encrypted or RAM-backed volume.
        max_age_days: of a receipt.
        max_count: receipts in all; the oldest go first.
        max_per_key: of one API key.
        max_bytes: the database; its log adds a few MiB.
        max_evidence_bytes: evidence of epochs in it.
    """

    dir: str = "receipts"
    max_age_days: Annotated[float, Meta(gt=0, le=36_500)] = 30.0
    max_count: Annotated[int, Meta(ge=1, le=100_000_000)] = 1_000_000
    max_per_key: Annotated[int, Meta(ge=1, le=100_000_000)] = 250_000
    max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 4 << 30
    max_evidence_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 512 << 20


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    """`[log]`: structured lines on standard error; `auto` is pretty on a terminal, else JSON."""

    format: Literal["auto", "json", "pretty"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class MeasuredConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. In the image it lies under dm-verity, hence its name."""

    model: Model
    attestation: Attestation
    policy: Policy = Policy()
    listen: Listen = Listen()
    tls: Tls = Tls()
    auth: Auth = Auth()
    operator: Operator = Operator()
    limits: Limits = Limits()
    engine: Engine = Engine()
    receipts: Receipts = Receipts()
    log: Log = Log()


def load_config(path: Path) -> MeasuredConfig:
    """Read, decode and check a configuration file.

    Raises:
        ConfigError: unreadable, not TOML, an unknown key, a wrong type, out of bounds, or
            settings that contradict each other. The message names the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read {path}: {reason}") from error
    return parse_config(text, folder=path.resolve().parent)


def parse_config(text: str, *, folder: Path) -> MeasuredConfig:
    """Decode the text of a configuration file; relative paths are taken from `folder`.

    Raises:
        ConfigError: as for `load_config`.
    """
    config = _resolve_paths(parse_toml(text, MeasuredConfig), folder)
    check_config(config)
    return config


def parse_toml(text: str, kind: type[Section]) -> Section:
    """Decode TOML strictly into a struct of sections.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type, out of bounds. The message names the
            key as the file spells it.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides its own, from long digits and depth
        raise ConfigError(f"not TOML: {error}") from error
    if _has_nul(raw):  # the one character that no path, name or argument can hold
        raise ConfigError("expected text without the character U+0000")
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), kind)) from error


def check_config(config: MeasuredConfig) -> None:
    """Check what no declaration can say: settings against each other.

    Raises:
        ConfigError: they contradict each other; the message names a key.
    """
    _check_listen(config.listen)
    _check_limits(config.limits)
    _check_engine(config.engine)
    _check_auth(config)
    _check_attestation(config)


def require_keys(config: MeasuredConfig) -> None:
    """Whether anybody could ask at all, once all input is there.

    Raises:
        ConfigError: keys are asked for, and none is known.
    """
    if config.auth.mode == "keys" and not config.auth.keys:
        raise ConfigError(
            "[auth] keys: missing; make one with `dcv keys new NAME`, or set mode to `loopback`"
        )


def _has_nul(value: object) -> bool:
    match value:
        case str():
            return "\0" in value
        case dict():
            return any(_has_nul(item) for pair in value.items() for item in pair)
        case list():
            return any(_has_nul(item) for item in value)
        case _:
            return False


def effective_config(config: MeasuredConfig) -> dict[str, object]:
    """The configuration with every default filled in, as plain values for display.

    It holds no secret: API keys are hashes, vendors' keys the names of credentials.
    """
    plain = msgspec.to_builtins(config)
    assert isinstance(plain, dict)
    return plain


_UNKNOWN = re.compile(
    r"^Object contains unknown field `(?P<field>[^`]*)`(?: - at `\$\.?(?P<at>[^`]*)`)?$"
)
_LOCATED = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<at>.*)`$")


def _explain(message: str, kind: type[Struct]) -> str:
    """Turn msgspec's message into one that names the key as the file spells it."""
    if unknown := _UNKNOWN.match(message):
        section, field = unknown["at"] or "", unknown["field"]
        known = _known_keys(section, kind)
        near = difflib.get_close_matches(field, known, n=1, cutoff=0.0)
        place = f"[{section}] {field}" if section else field
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"unknown key {place}{hint}"
    if located := _LOCATED.match(message):
        section, dot, field = located["at"].partition(".")
        place = f"[{section}] {field}" if dot else section
        return f"{place}: {located['what'][0].lower()}{located['what'][1:]}"
    return message[0].lower() + message[1:]


def _known_keys(section: str, kind: type[Struct]) -> list[str]:
    sections = {field.name: field.type for field in msgspec.structs.fields(kind)}
    if not section:
        return sorted(sections)
    struct = sections.get(section)
    return [field.name for field in msgspec.structs.fields(struct)] if struct else []


def _resolve_paths(config: MeasuredConfig, folder: Path) -> MeasuredConfig:
    def absolute(path: str) -> str:
        return str(folder / path) if path else ""

    replace = msgspec.structs.replace
    return replace(
        config,
        listen=replace(config.listen, status_socket=absolute(config.listen.status_socket)),
        tls=replace(
            config.tls,
            certificate_file=absolute(config.tls.certificate_file),
            chain_file=absolute(config.tls.chain_file),
            client_ca_file=absolute(config.tls.client_ca_file),
        ),
        model=replace(config.model, path=absolute(config.model.path)),
        attestation=replace(
            config.attestation,
            attester_socket=absolute(config.attestation.attester_socket),
            image_digest_file=absolute(config.attestation.image_digest_file),
            tsm_dir=absolute(config.attestation.tsm_dir),
            tpm_roots_file=absolute(config.attestation.tpm_roots_file),
            storage_key_file=absolute(config.attestation.storage_key_file),
            endorsements_dir=absolute(config.attestation.endorsements_dir),
            rim_dirs=tuple(absolute(path) for path in config.attestation.rim_dirs),
            nvidia_sdk_python=absolute(config.attestation.nvidia_sdk_python),
        ),
        receipts=replace(config.receipts, dir=absolute(config.receipts.dir)),
        engine=replace(
            config.engine,
            python=absolute(config.engine.python),
            runtime_dir=absolute(config.engine.runtime_dir),
            python_path=tuple(absolute(path) for path in config.engine.python_path),
        ),
    )


def _check_listen(listen: Listen) -> None:
    try:
        ipaddress.ip_address(listen.host)
    except ValueError:
        raise ConfigError("[listen] host: expected a literal IP address") from None


def _check_limits(limits: Limits) -> None:
    if limits.max_body_bytes_total < limits.max_body_bytes:
        raise ConfigError(
            f"[limits] max_body_bytes_total: expected at least max_body_bytes "
            f"({limits.max_body_bytes})"
        )


def _check_auth(config: MeasuredConfig) -> None:
    auth = config.auth
    if not config.operator.max_keys:
        require_keys(config)
    if auth.mode == "loopback" and not _is_loopback(config.listen.host):
        raise ConfigError(
            f"[auth] mode: `loopback` needs a loopback [listen] host, got `{config.listen.host}`"
        )
    for what, values in (
        ("name", [key.name for key in auth.keys]),
        ("sha256", [key.sha256 for key in auth.keys]),
    ):
        if len(set(values)) != len(values):
            raise ConfigError(f"[auth] keys: expected every {what} once")


def _check_attestation(config: MeasuredConfig) -> None:
    """The evidence that is configured is evidence that the appliance's own policy accepts: the
    boot would find out, but only once the machine was asked."""
    attestation, policy = config.attestation, config.policy
    tee_type = "unsafe_simulated" if attestation.cpu == "simulated" else attestation.cpu
    if tee_type not in policy.tee_types:
        raise ConfigError(
            f"[policy] tee_types: does not list `{tee_type}`, which [attestation] cpu needs"
        )
    gpus = "unsafe_simulated" if attestation.gpu == "simulated" else attestation.gpu
    if gpus != policy.gpus:
        raise ConfigError(f"[policy] gpus: expected `{gpus}`, which [attestation] gpu needs")
    if attestation.nvidia_sdk != "off" and not attestation.nvidia_sdk_python:
        raise ConfigError("[attestation] nvidia_sdk_python: missing (its own environment's)")
    for key, urls in CREDENTIAL_URLS.items():
        for url in urls if getattr(attestation, key) else ():
            if not getattr(attestation, url).startswith("https://"):
                raise ConfigError(
                    f"[attestation] {url}: expected https, because {key} is sent there"
                )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def _check_engine(engine: Engine) -> None:
    if not engine.unsafe_command and not engine.python:
        raise ConfigError("[engine] python: missing (the interpreter of the engine's environment)")
    if engine.nodes > 1 and not engine.coordinator:
        raise ConfigError("[engine] coordinator: required when nodes > 1 (host:port of rank 0)")
    if engine.node_rank >= engine.nodes:
        raise ConfigError(f"[engine] node_rank: expected below nodes ({engine.nodes})")
    for key in engine.extra_request_keys:
        if key in REFUSED_REQUEST_KEYS:
            raise ConfigError(f"[engine] extra_request_keys: `{key}` may never come from a client")
