"""The embedded data set: is this sentence acceptable English?

A small grammar makes pairs of sentences: an acceptable one and a minimal violation of it (one word exchanged, added or
dropped, or two words swapped). Both go into the data, so that no single word gives the answer away. Everything is a
pure function of the seed.

A tokenizer and the configuration of a small BERT go with it, so that a demonstration and the tests download nothing.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

LABEL_NAMES = ("unacceptable", "acceptable")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Pair:
    """An acceptable sentence, its minimal violation, and the rule that tells them apart."""

    acceptable: str
    unacceptable: str
    phenomenon: str


@dataclass(frozen=True)
class Noun:
    """A noun; `reflexive` is the pronoun that its singular binds."""

    singular: str
    plural: str
    reflexive: str

    def form(self, plural: bool) -> str:
        return self.plural if plural else self.singular

    def bound_reflexive(self, plural: bool) -> str:
        return "themselves" if plural else self.reflexive


@dataclass(frozen=True)
class Verb:
    """A verb in its three forms; `base` is the plural present and the infinitive, `past` the participle too."""

    base: str
    third: str
    past: str

    def present(self, plural: bool) -> str:
        return self.base if plural else self.third


def _nouns(reflexive: str, words: str) -> tuple[Noun, ...]:
    return tuple(Noun(singular, plural, reflexive) for singular, plural in (word.split("/") for word in words.split()))


def _verbs(words: str) -> tuple[Verb, ...]:
    return tuple(Verb(*word.split("/")) for word in words.split())


MEN = _nouns(
    "himself",
    "boy/boys king/kings uncle/uncles waiter/waiters prince/princes monk/monks father/fathers brother/brothers",
)
WOMEN = _nouns(
    "herself",
    "girl/girls queen/queens aunt/aunts waitress/waitresses princess/princesses nun/nuns mother/mothers "
    "sister/sisters",
)
THINGS = _nouns(
    "itself",
    "key/keys cabinet/cabinets lamp/lamps table/tables door/doors picture/pictures garden/gardens bridge/bridges",
)
PEOPLE = MEN + WOMEN
INTRANSITIVE = _verbs(
    "laugh/laughs/laughed arrive/arrives/arrived smile/smiles/smiled cough/coughs/coughed wait/waits/waited "
    "faint/faints/fainted travel/travels/travelled"
)
TRANSITIVE = _verbs(
    "admire/admires/admired praise/praises/praised blame/blames/blamed watch/watches/watched trust/trusts/trusted "
    "describe/describes/described avoid/avoids/avoided"
)
IRREGULAR = (("see", "seen"), ("steal", "stolen"), ("break", "broken"), ("forget", "forgotten"), ("choose", "chosen"))
PERSON_ADJECTIVES = ("old", "young", "quiet", "proud", "clever", "tired")
THING_ADJECTIVES = ("old", "small", "dusty", "broken", "famous", "expensive")
PREPOSITIONS = ("near", "behind", "beside", "below")
TIMES = ("today", "yesterday", "again", "twice")
DEMONSTRATIVES = (("this", "these"), ("that", "those"))

Words = list[str]
Rule = Callable[[random.Random], tuple[Words, Words]]


def _adjective(rng: random.Random, noun: Noun) -> str:
    return rng.choice(THING_ADJECTIVES if noun in THINGS else PERSON_ADJECTIVES)


def _noun_phrase(rng: random.Random, noun: Noun, plural: bool, determiner: str = "the") -> Words:
    adjective = [_adjective(rng, noun)] if rng.random() < 0.3 else []
    return [determiner, *adjective, noun.form(plural)]


def _modifier(rng: random.Random, head_plural: bool, attractor: Noun, attractor_plural: bool) -> Words:
    """Return words between a subject and its verb which hold another noun: the one that must not be agreed with."""
    phrase = _noun_phrase(rng, attractor, attractor_plural)
    if attractor in THINGS or rng.random() < 0.34:
        return [rng.choice(PREPOSITIONS), *phrase]
    verb = rng.choice(TRANSITIVE)
    if rng.random() < 0.5:
        return ["that", *phrase, verb.present(attractor_plural)]
    return ["that", verb.present(head_plural), *phrase]


def _replaced(words: Words, position: int, word: str) -> Words:
    return [*words[:position], word, *words[position + 1 :]]


def _swapped(words: Words, first: int, second: int) -> Words:
    swapped = list(words)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return swapped


def agreement(rng: random.Random) -> tuple[Words, Words]:
    """The verb agrees with the head of its subject, whatever noun stands nearer."""
    plural = rng.random() < 0.5
    noun = rng.choice(PEOPLE + THINGS)
    attractor = rng.choice(THINGS if noun in THINGS else PEOPLE)
    attractor_plural = plural if rng.random() < 0.3 else not plural
    subject = [*_noun_phrase(rng, noun, plural), *_modifier(rng, plural, attractor, attractor_plural)]
    if noun in THINGS or rng.random() < 0.5:
        forms, tail = ("is", "are"), [_adjective(rng, noun)]
    else:
        verb = rng.choice(INTRANSITIVE)
        forms, tail = (verb.third, verb.base), [rng.choice(TIMES)]
    return [*subject, forms[plural], *tail], [*subject, forms[not plural], *tail]


def reflexive(rng: random.Random) -> tuple[Words, Words]:
    """A reflexive pronoun takes its gender and number from the subject, not from the nearest noun."""
    plural = rng.random() < 0.5
    noun = rng.choice(PEOPLE)
    right = noun.bound_reflexive(plural)
    rivals = [(n, p) for n in PEOPLE for p in (False, True) if n.bound_reflexive(p) != right]
    attractor, attractor_plural = rng.choice(rivals)
    words = [
        *_noun_phrase(rng, noun, plural),
        *_modifier(rng, plural, attractor, attractor_plural),
        rng.choice(TRANSITIVE).past,
    ]
    return [*words, right], [*words, attractor.bound_reflexive(attractor_plural)]


def negative_polarity(rng: random.Random) -> tuple[Words, Words]:
    """The word "ever" needs a negative subject: one inside a relative clause does not license it."""
    noun, other = rng.sample(PEOPLE, 2)
    embedded = ["the", other.form(False), rng.choice(TRANSITIVE).third]
    words = ["no", noun.form(False), "that", *embedded, "has", "ever", rng.choice(INTRANSITIVE).past]
    if rng.random() < 0.5:
        return words, _swapped(words, 0, 3)
    return words, _replaced(words, 0, rng.choice(("the", "this", "that")))


def word_order(rng: random.Random) -> tuple[Words, Words]:
    """Determiner, adjective, noun, auxiliary, verb, preposition: two neighbours change places."""
    subject, place = rng.choice(PEOPLE), rng.choice(THINGS)
    plural, place_plural = rng.random() < 0.5, rng.random() < 0.5
    words = [
        *("the", _adjective(rng, subject), subject.form(plural)),
        *("will", rng.choice(INTRANSITIVE).base),
        *(rng.choice(PREPOSITIONS), "the", _adjective(rng, place), place.form(place_plural)),
    ]
    first = rng.randrange(len(words) - 1)
    return words, _swapped(words, first, first + 1)


def determiner(rng: random.Random) -> tuple[Words, Words]:
    """A demonstrative agrees with its noun across adjectives; the past tense says nothing of the number."""
    forms = rng.choice(DEMONSTRATIVES)
    plural = rng.random() < 0.5
    noun = rng.choice(THINGS)
    adjectives = rng.sample(THING_ADJECTIVES, rng.choice((1, 2)))
    person = _noun_phrase(rng, rng.choice(PEOPLE), rng.random() < 0.5)
    head = [*person, rng.choice(TRANSITIVE).past]
    words = [*head, forms[plural], *adjectives, noun.form(plural)]
    if rng.random() < 0.5:
        return words, _replaced(words, len(head), forms[not plural])
    return words, _replaced(words, len(words) - 1, noun.form(not plural))


def argument_structure(rng: random.Random) -> tuple[Words, Words]:
    """A transitive verb needs its object, an intransitive one takes none."""
    plural = rng.random() < 0.5
    noun, attractor = rng.sample(PEOPLE, 2)
    subject = [*_noun_phrase(rng, noun, plural), *_modifier(rng, plural, attractor, rng.random() < 0.5)]
    tail = [rng.choice(TIMES)]
    pronoun = rng.choice(("him", "her", "them"))
    if rng.random() < 0.5:
        verb = rng.choice(TRANSITIVE).past
        return [*subject, verb, pronoun, *tail], [*subject, verb, *tail]
    verb = rng.choice(INTRANSITIVE).past
    return [*subject, verb, *tail], [*subject, verb, pronoun, *tail]


def auxiliary(rng: random.Random) -> tuple[Words, Words]:
    """The perfect takes a participle, a modal verb the infinitive, whatever comes in between."""
    noun, object_noun = rng.choice(PEOPLE), rng.choice(THINGS)
    base, participle = rng.choice(IRREGULAR)
    subject = [*_noun_phrase(rng, noun, False), *_modifier(rng, False, rng.choice(PEOPLE), rng.random() < 0.5)]
    between = rng.sample(("not", "often", "quietly"), rng.choice((0, 1)))
    object_phrase = _noun_phrase(rng, object_noun, rng.random() < 0.5)
    helper, right, wrong = rng.choice((("has", participle, base), ("will", base, participle)))
    return [*subject, helper, *between, right, *object_phrase], [*subject, helper, *between, wrong, *object_phrase]


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (agreement, reflexive, negative_polarity, word_order, determiner, argument_structure, auxiliary)
}


def _sentence(words: Words) -> str:
    return " ".join(words).capitalize() + " ."


def generate_pairs(count: int, seed: int) -> list[Pair]:
    """Return `count` pairs, the rules taking turns; no sentence occurs twice, in whichever role."""
    rng = random.Random(seed)
    names = list(RULES)
    seen: set[str] = set()
    pairs: list[Pair] = []
    while len(pairs) < count:
        phenomenon = names[len(pairs) % len(names)]
        good, bad = (_sentence(words) for words in RULES[phenomenon](rng))
        if good not in seen and bad not in seen:
            seen.update((good, bad))
            pairs.append(Pair(good, bad, phenomenon))
    return pairs


def make_rows(train_pairs: int, validation_pairs: int, seed: int) -> tuple[list[dict[str, object]], ...]:
    """Return the rows for training and validation. A pair is never divided, so that neither half sees the other's."""
    rng = random.Random(seed)
    pairs = generate_pairs(train_pairs + validation_pairs, rng.getrandbits(32))
    rng.shuffle(pairs)
    splits = []
    for part in (pairs[:train_pairs], pairs[train_pairs:]):
        rows: list[dict[str, object]] = [
            {"sentence": sentence, "label": LABEL_NAMES[label], "phenomenon": pair.phenomenon}
            for pair in part
            for label, sentence in ((1, pair.acceptable), (0, pair.unacceptable))
        ]
        rng.shuffle(rows)
        splits.append(rows)
    return tuple(splits)


def make_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, lower-cased, whose vocabulary is that of the sentences."""
    words = sorted({word for sentence in sentences for word in sentence.lower().split()})
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> BertConfig:
    """Return a BERT sized down to what two processor cores train in a minute."""
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        # So small a model, trained for a minute, fits too little rather than too much.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_rows(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data_set(folder: Path, train_pairs: int, validation_pairs: int, seed: int) -> None:
    """Write train.jsonl and validation.jsonl into `folder`, with tokenizer and model configuration in folder/model."""
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = make_rows(train_pairs, validation_pairs, seed)
    write_rows(train, folder / "train.jsonl")
    write_rows(validation, folder / "validation.jsonl")
    tokenizer = make_tokenizer(str(row["sentence"]) for row in train)
    tokenizer.save_pretrained(folder / "model")
    make_config(tokenizer).save_pretrained(folder / "model")
