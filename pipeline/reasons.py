"""Why a picture is not kept: the closed list that every stage draws from and every funnel counts.

A reason is an outcome, not a failure. It is stored beside the picture's id in
``<shard>.rejected.parquet`` and counted in receipts: in = out + the sum of rejections by reason.
"""

from enum import StrEnum


class RejectReason(StrEnum):
    """One word for why a record was not kept. The values are stored: never rename one."""

    # The record, as the readers find it.
    TRUNCATED_ARCHIVE = "truncated_archive"  # the file that holds the records ends too early
    BAD_RECORD = "bad_record"  # a record that cannot be read: no id, a wrong type, broken JSON
    MISSING_PICTURE = "missing_picture"  # a record without a picture
    DUPLICATE_ID = "duplicate_id"  # another record of the shard has its id, and is kept
    EXCLUDED = "excluded"  # on the recipe's list of pictures to leave out

    # The download (pipeline.fetch); those that may pass are tried again.
    BAD_URL = "bad_url"  # not http or https, or no URL at all
    PRIVATE_ADDRESS = "private_address"  # leads to an address that is not public
    UNKNOWN_HOST = "unknown_host"  # the name has no address
    CONNECTION_FAILED = "connection_failed"  # refused, reset, no TLS, or the body ended too early
    TIMEOUT = "timeout"  # not there before the deadline
    TOO_MANY_REDIRECTS = "too_many_redirects"
    HTTP_ERROR = "http_error"  # a status that will not change: 404, 410, 403
    UNAVAILABLE = "unavailable"  # a status that may: 429, 5xx
    BAD_RESPONSE = "bad_response"  # not the HTTP that was asked for
    OPTED_OUT = "opted_out"  # X-Robots-Tag forbids this use
    SHARD_FULL = "shard_full"  # the shard's memory was full: a retry makes another shard of these
    PLACEHOLDER = "placeholder"  # "this picture was removed", or a file too small to be one

    # The picture's bytes (pipeline.images).
    EMPTY_FILE = "empty_file"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # no picture format's signature: text, HTML, junk
    UNSUPPORTED_FORMAT = "unsupported_format"  # a picture, of a format or kind that is not read
    TRUNCATED = "truncated"  # the bytes end before the picture does
    UNDECODABLE = "undecodable"  # a readable format, broken inside
    TOO_SMALL = "too_small"  # shorter edge below the limit
    TOO_MANY_BYTES = "too_many_bytes"  # file above the limit
    TOO_MANY_PIXELS = "too_many_pixels"  # width times height above the limit

    # Copies (dedup).
    EXACT_COPY = "exact_copy"  # equal bytes or equal pixels
    NEAR_DUPLICATE = "near_duplicate"  # similarity to a kept picture at or above the threshold
    CONTAMINATION = "contamination"  # like a picture that models are evaluated with

    # The mixture.
    FILTERED = "filtered"  # a filter of the recipe does not let it through
    NOT_ASKED = "not_asked"  # the caption set was made for fewer pictures
    NO_CAPTION = "no_caption"  # the caption set has none that can be used
    NOT_SAMPLED = "not_sampled"  # beyond the number of pictures that the recipe takes


class PictureError(Exception):
    """Bytes that do not become a picture: ``reason`` is counted, ``detail`` is for the reader."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
