"""Small sentencepiece models, trained on the spot on sentences in thirteen scripts."""

import io

import pytest

CORPUS = """The quick brown fox jumps over the lazy dog while two cats sleep on the warm roof.
Ein Hund läuft über die Straße und bellt die Katze an, die Größe zählt.
Le garçon mange une pomme près de la fenêtre où naît l'été.
El niño juega con una pelota roja en el jardín; ¿qué será mañana?
Собака бежит по улице, а кошка спит на тёплой крыше.
两只猫在沙发上睡觉，一只狗在街上跑。
猫がソファーの上で寝ている。東京タワーは赤いです。
고양이 두 마리가 소파에서 자고 있다.
قطتان تنامان على الأريكة والكلب يجري في الشارع.
दो बिल्लियाँ सोफे पर सो रही हैं।
สุนัขวิ่งอยู่บนถนน แมวนอนบนหลังคา
Δύο γάτες κοιμούνται στον καναπέ, 3 σκύλοι και 42 πουλιά.
שני חתולים ישנים על הספה.""".splitlines()

HARD = [
    *CORPUS,
    "",
    " ",
    "   ",
    "\n",
    "\t",
    "  lead",
    "trail  ",
    "dou  ble   space",
    "a\nb\tc\r\nd",
    "ｆｕｌｌ ｗｉｄｔｈ １２３．４５",
    "ﬁne ligature ㎏ ™ ½ ① …",
    "e\u0301te\u0301 is été",
    "Ω Å Å İstanbul ǅ ſ",
    "ｶﾞﾊﾟ 한 각 각",
    "😀 emoji 👨‍👩‍👧‍👦 🇩🇪",
    "zero\u200bwidth nb\u00a0sp ideo\u3000sp \u2028 line \ufeff bom",
    "\x00\x07ctl\x7f",
    "unknown ☃ ߷߷ ꙮ",
    "▁ under ▁▁ x",
    "x" * 300,
]


def train_model(**options) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=buffer, num_threads=1, minloglevel=2, **options
    )
    return buffer.getvalue()


@pytest.fixture(scope="session")
def hard_texts() -> list[str]:
    return HARD


@pytest.fixture(scope="session")
def train():
    return train_model


@pytest.fixture(scope="session")
def xlm_roberta_model() -> bytes:
    return train_model(vocab_size=250, character_coverage=0.999)


@pytest.fixture(scope="session")
def llama_model() -> bytes:
    return train_model(
        vocab_size=650,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
    )


@pytest.fixture
def xlm_roberta_dir(tmp_path, xlm_roberta_model):
    """A folder as old AltCLIP checkpoints have it: the sentencepiece model and no tokenizer.json."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "sentencepiece.bpe.model").write_bytes(xlm_roberta_model)
    return folder
