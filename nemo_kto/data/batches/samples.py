"""Token stores -> the samples of a split: which ones, how often, and how much of those that are too long.

Everything here is numbers about samples, a few bytes each; tokens are read when a sample is asked for.

Shapes: `n` samples of a split.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens.store import Notes, TokenStore, add_notes
from nemo_kto.data.tokens.tokenization import TokenizedSample

Overlong = Literal["drop", "truncate_prompt_left", "truncate_response"]
"""What becomes of a sample of too many tokens. "drop": it is left out. "truncate_prompt_left": its prompt loses its
beginning, apart from a BOS token. "truncate_response": its response loses its end, and with it the EOS token. Where
that would leave nothing of the prompt or of the response, or cut into what stands for an image, the sample is left
out."""


_BEFORE_IMAGE = 2
"""Tokens that stay before the first image's where a prompt loses its beginning."""


@dataclass(frozen=True, eq=False)
class Samples(Sequence[TokenizedSample]):
    """The samples of a split.

    Attributes:
        stores: Where their tokens are, one for each source.
        store_of: [n] number of the store each is in.
        place: [n] its place there.
        prompt_kept: [n] tokens of its prompt, the last ones.
        response_kept: [n] tokens of its response, the first ones.
        bos_token_id: What a prompt that lost its beginning still begins with, if it did before.
        num_overlong: Records that were left out for their length.
        num_bad: Records that could not be used.
    """

    stores: Sequence[TokenStore]
    store_of: np.ndarray
    place: np.ndarray
    prompt_kept: np.ndarray
    response_kept: np.ndarray
    bos_token_id: int | None = None
    num_overlong: int = 0
    num_bad: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.place)

    def __getitem__(self, index: int) -> TokenizedSample:  # type: ignore[override]  # slices are of no use
        """One sample, read from disk."""
        import torch  # only what is trained on needs it: a look at data is quicker without

        store = self.stores[self.store_of[index]]
        row = store.samples[self.place[index]]
        middle = int(row["start"]) + int(row["prompt"])
        first = middle - int(self.prompt_kept[index])
        prompt = store.tokens[first:middle].astype(np.int64)
        if first > row["start"] and store.tokens[row["start"]] == self.bos_token_id:
            prompt[0] = self.bos_token_id
        response = store.tokens[middle : middle + int(self.response_kept[index])].astype(np.int64)
        return TokenizedSample(
            torch.from_numpy(prompt),
            torch.from_numpy(response),
            bool(row["desirable"]),
            int(row["prompt_key"]),
            float(row["weight"]),
            store.images_of(int(self.place[index])) if row["images"] else (),
        )

    def column(self, name: str) -> np.ndarray:
        """[n] what the index of the stores says of each sample; see `token_store.INDEX`."""
        columns = [store.samples[name] for store in self.stores]
        result = np.empty(len(self), dtype=columns[0].dtype if columns else np.int64)
        for number, column in enumerate(columns):
            mine = self.store_of == number
            result[mine] = column[self.place[mine]]
        return result

    @property
    def last_tokens(self) -> np.ndarray:
        """[n] the last token of each response as it is trained on."""
        ends = self.column("start") + self.column("prompt") + self.response_kept - 1
        last = np.empty(len(self), dtype=np.int64)
        for number, store in enumerate(self.stores):
            mine = self.store_of == number
            last[mine] = store.tokens[ends[mine]]
        return last

    @property
    def notes(self) -> Notes:
        """What a person should know about the records that the samples are among."""
        notes: Notes = {}
        for store in {store.folder: store for store in self.stores}.values():
            add_notes(notes, store.notes)
        return notes

    @property
    def prompt_keys(self) -> np.ndarray:
        """[n] int64, equal for samples of the same prompt, before any of it was cut off."""
        return self.column("prompt_key")

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens of prompt and response together."""
        lengths: np.ndarray = self.prompt_kept + self.response_kept
        return lengths

    @property
    def num_desirable(self) -> int:
        """Samples with thumbs up."""
        return int(self.column("desirable").sum())

    @property
    def num_undesirable(self) -> int:
        """Samples with thumbs down."""
        return len(self) - self.num_desirable

    @property
    def class_totals(self) -> tuple[float, float]:
        """The sums of the weights of the samples with thumbs up, and of those with thumbs down."""
        weights, desirable = self.column("weight").astype(np.float64), self.column("desirable")
        return float(weights[desirable].sum()), float(weights[~desirable].sum())

    @property
    def num_truncated(self) -> int:
        """Samples that lost tokens."""
        whole = self.column("prompt") + self.column("response")
        return int((self.lengths < whole).sum())

    def digest(self, *, weights: bool) -> str:
        """A digest of tokens and labels in their order; equal on every machine and wherever they were read from.

        Args:
            weights: Whether it also depends on the samples' weights.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in ("prompt_key", "response_key", "desirable", *(["weight"] if weights else [])):
            digest.update(self.column(name).tobytes())
        digest.update(self.prompt_kept.tobytes() + self.response_kept.tobytes())
        return digest.hexdigest()

    def chosen(self, index: np.ndarray) -> "Samples":
        """Those at some places, or those for which a mask is true."""
        return replace(
            self,
            store_of=self.store_of[index],
            place=self.place[index],
            prompt_kept=self.prompt_kept[index],
            response_kept=self.response_kept[index],
        )


def fit(store: TokenStore, *, max_length: int, overlong: Overlong, bos_token_id: int | None) -> Samples:
    """Returns a store's samples, none longer than `max_length` tokens."""
    prompt, response = store.samples["prompt"].copy(), store.samples["response"].copy()
    too_long = prompt + response > max_length
    truncated = np.zeros_like(too_long)
    if overlong == "truncate_prompt_left":
        truncated = too_long & (response < max_length)
        # the token before the first image's, by which some models tell where it begins, and the BOS token stay too
        start = store.samples["image_start"] - (prompt + response - max_length)
        truncated &= (store.samples["images"] == 0) | (start >= _BEFORE_IMAGE)
        prompt[truncated] = max_length - response[truncated]
    elif overlong == "truncate_response":
        truncated = too_long & (prompt < max_length)
        response[truncated] = max_length - prompt[truncated]
    dropped = too_long & ~truncated
    everything = Samples(
        [store],
        store_of=np.zeros(len(store), dtype=np.int32),
        place=np.arange(len(store)),
        prompt_kept=prompt,
        response_kept=response,
        bos_token_id=bos_token_id,
        num_overlong=int(dropped.sum()),
        num_bad=store.num_bad,
    )
    return everything.chosen(~dropped)


def mix(parts: Sequence[tuple[Source, Samples]], *, seed: int) -> Samples:
    """Returns the samples of several sources, each as often as its source says, in the order of sources and files.

    Which ones are taken where a source gives a cap or a fraction depends on the seed and on the source's place.
    """
    taken = [_portion(source, samples, np.random.default_rng([seed, i])) for i, (source, samples) in enumerate(parts)]
    return Samples(
        [part.stores[0] for part in taken],
        store_of=np.concatenate([np.full(len(part), i, dtype=np.int32) for i, part in enumerate(taken)]),
        place=np.concatenate([part.place for part in taken]),
        prompt_kept=np.concatenate([part.prompt_kept for part in taken]),
        response_kept=np.concatenate([part.response_kept for part in taken]),
        bos_token_id=taken[0].bos_token_id,
        num_overlong=sum(part.num_overlong for part in taken),
        num_bad=sum(part.num_bad for part in taken),
    )


def _portion(source: Source, samples: Samples, rng: np.random.Generator) -> Samples:
    """A source's samples, at most `max_records` of them, each `weight` times; at least one if there are any."""
    places = np.arange(len(samples))
    if source.max_records is not None and source.max_records < len(places):
        places = np.sort(rng.permutation(places)[: source.max_records])
    times, fraction = divmod(source.weight, 1)
    some = np.sort(rng.permutation(places)[: max(round(fraction * len(places)), 0 if times else 1)])
    return samples.chosen(np.concatenate([*[places] * int(times), some]))


def split_by_prompt(samples: Samples, fraction: float, *, seed: int) -> tuple[Samples, Samples]:
    """Returns a training and a validation split, no prompt of which is in both.

    Prompts are put into an order that depends on the seed and on their own tokens only; the first ones, until they
    have `fraction` of the samples, are validated on. So a split hardly changes when data is added.
    """
    keys, group, sizes = np.unique(samples.prompt_keys, return_inverse=True, return_counts=True)
    order = np.argsort(_mixed(keys.astype(np.uint64), seed), kind="stable")
    wanted = fraction * len(samples)
    before = np.cumsum(sizes[order]) - sizes[order]
    held_out = np.zeros(len(keys), dtype=bool)
    held_out[order[before + sizes[order] / 2 <= wanted]] = True
    held_out[order[0]] = True  # one prompt at least on either side; of a single one, on that of training
    held_out[order[-1]] = False
    validated = held_out[group]
    return samples.chosen(~validated), samples.chosen(validated)


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Numbers [k] uint64 that look drawn at random for each key and seed: the finalizer of SplitMix64."""
    mixed = keys + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def read_samples(
    sources: Sequence[Source],
    tokens_of: Callable[[Source], TokenStore],
    *,
    max_length: int,
    overlong: Overlong,
    bos_token_id: int | None,
    seed: int,
) -> Samples:
    """Returns the samples of several sources, fitted and mixed; see `fit` and `mix`."""
    fitted = (
        fit(tokens_of(source), max_length=max_length, overlong=overlong, bos_token_id=bos_token_id)
        for source in sources
    )
    return mix(list(zip(sources, fitted, strict=True)), seed=seed)
