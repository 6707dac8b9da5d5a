"""What a reader is asked for."""

from dataclasses import dataclass

TEXT_BYTES_MAX = 64 << 20  # JSON state files: a log_history of a million entries stays below


@dataclass(frozen=True, slots=True)
class Ask:
    """How far to look.

    tensors_max       list at most so many tensors; 0: only whether the structure is whole
    crc               read all data and compare the checksums that the format holds
    header_bytes_max  largest safetensors header to parse; the format itself allows 100 MB
    """

    tensors_max: int = 0
    crc: bool = False
    header_bytes_max: int = 16 << 20
