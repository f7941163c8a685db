"""Whether an answer is a caption: checks that mark what a model wrote, and never change it.

They look for plain signs and are wary, since a caption may quote a refusal, transcribe Chinese, or
describe the same tile again and again. What is in quotation marks is the picture's text.
"""
# ruff: noqa: RUF001  # letters and marks of many scripts mean themselves

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

from captioning.engine.questions import Ending
from captioning.outcomes import CaptionOutcome
from pipeline.recipe import Script


def judge(ending: Ending, text: str, prompt: str, scripts: Sequence[Script]) -> CaptionOutcome:
    """Return the outcome of an answer: the first that holds, so what explains another comes first.

    An answer that failed has no text to look at. An echo may repeat words of refusal that are in
    the prompt; a refusal may be in another script; a loop runs until the token limit.
    """
    if ending is Ending.NOT_TAKEN:
        return CaptionOutcome.PICTURE_FAILED
    if ending is Ending.FAILED:
        return CaptionOutcome.ENGINE_FAILED
    if ending is Ending.WITHHELD:
        return CaptionOutcome.REFUSED
    if is_empty(text):
        return CaptionOutcome.EMPTY
    if has_thinking(text):
        return CaptionOutcome.THINKING
    if is_echo(text, prompt):
        return CaptionOutcome.ECHO
    if is_refusal(text):
        return CaptionOutcome.REFUSED
    if is_repeating(text):
        return CaptionOutcome.REPEATING
    if is_in_other_script(text, scripts):
        return CaptionOutcome.WRONG_SCRIPT
    return CaptionOutcome.TRUNCATED if ending is Ending.LENGTH else CaptionOutcome.OK


def is_empty(text: str) -> bool:
    """Tell whether a text has neither a letter nor a digit: space, dashes, exclamation marks."""
    return _LETTER_OR_DIGIT.search(text) is None


ECHO_CHARS = 40
"""Letters and digits by which an echo is known: more than a caption and an instruction begin with
in common ("The image shows …"), less than evenmix's shortest prompt has (41)."""

_ECHO_CHARS_IF_SHORT = 12
"""The same where prompt or answer has less: a prompt's "Image:" makes no echo of "Image of a …"."""

_LABEL_CHARS = 15
"""The letters of what may come before an echo, such as "Prompt:"."""

_HEAD_CHARS = 4 * ECHO_CHARS
"""What is looked at for all of these, with the blanks and marks between them."""


def has_thinking(text: str) -> bool:
    """Tell whether a model's thinking is in its answer, between tags or cut off in its midst."""
    return "</think>" in text or text.lstrip().startswith("<think>")


def is_echo(text: str, prompt: str) -> bool:
    """Tell whether a text is the prompt or begins with one of its paragraphs.

    Only letters and digits count. What the prompt quotes may be quoted: paragraphs that begin with
    a quotation mark are the picture's own data, with which a caption may well begin.
    """
    head = _bare(text[:_HEAD_CHARS])[: _LABEL_CHARS + ECHO_CHARS]
    for paragraph in prompt.split("\n\n"):
        sought = _bare(paragraph[:_HEAD_CHARS])[:ECHO_CHARS]
        if paragraph.startswith('"') or not sought:
            continue
        if head == sought or (len(sought) == ECHO_CHARS and sought in head):
            return True
        # A short paragraph goes on in the answer, or the answer ends within the paragraph.
        shared = min(len(head), len(sought))
        if shared >= _ECHO_CHARS_IF_SHORT and head[:shared] == sought[:shared]:
            return True
    return False


def is_refusal(text: str) -> bool:
    """Tell whether a text begins by declining: an apology, or "I cannot" with what is asked for.

    Known in English, German, French, Spanish, Italian, Portuguese, Russian, Arabic, Chinese,
    Japanese and Korean. Only the beginning counts, and a quotation there is none.
    """
    head = " ".join(_MARKUP.sub("", text[:_REFUSAL_CHARS]).replace("’", "'").lower().split())
    return _REFUSAL.match(head) is not None


LOOP_TIMES = 3
LOOP_CHARS = 120
LOOP_CHARS_WITHOUT_SPACES = 40
"""A text that ends in a loop says the same at least three times in a row, and for so long: a
flag's thirteen stripes ("red, white, …") take 78 characters. A character of a script without spaces
says as much as three others. Both numbers were chosen by the examples of tests/test_checks.py."""

LOOP_COMPRESSION = 5.0
LOOP_COMPRESSION_CHARS = 500
"""The last characters of a text that says nearly the same again and again become so many times
smaller by zlib. Whisper (Radford et al. 2022, section 4.5) tries again above 2.4, but a caption
that goes through ten lines of text in the same words reaches 3.7, in Cyrillic letters 4.7."""


def is_repeating(text: str) -> bool:
    """Tell whether a text ends in a loop: the same again and again, or nearly the same."""
    return _ends_in_loop(text.rstrip(_MARKS)) or _ends_in_much_the_same(text)


def is_in_other_script(text: str, scripts: Sequence[Script]) -> bool:
    """Tell whether more than a quarter of a text's letters are in none of ``scripts``.

    What is quoted does not count, unless there is nothing else. A quarter is more than the names
    and characters that captions give without quotation marks, and a caption that goes over into
    Chinese on its way soon has as much.
    """
    if "latin" in scripts and text.isascii():
        return False
    outside = _letters_outside(tuple(scripts))
    if outside.search(text) is None:
        return False
    prose = _QUOTED.sub(" ", text)
    num_letters = _length(_LETTERS, prose)
    if not num_letters:
        prose, num_letters = text, _length(_LETTERS, text)
    return 4 * _length(outside, prose) > num_letters


_LETTERS = re.compile(r"[^\W\d_]+")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_NEITHER = re.compile(r"[\W_]+")
_MARKS = " \n\t.,;:!?\"'”’*…-–—。，、；！？」』"

_QUOTED = re.compile(
    r"""  "[^"]*(?:"|\Z) | “[^”"]*(?:[”"]|\Z) | „[^“”]*(?:[“”]|\Z) | «[^»]*(?:»|\Z)
        | 「[^」]*(?:」|\Z) | 『[^』]*(?:』|\Z) | 《[^》]*(?:》|\Z)
        | '(?<!\w')[^']*'(?!\w) | ‘(?<!\w‘)[^’]*’(?!\w)
    """,
    re.VERBOSE,
)
"""A quotation, which the token limit may leave open."""


def _bare(text: str) -> str:
    """Return the letters and digits of a text, in lower case."""
    return _NEITHER.sub("", text.lower())


def _length(pattern: re.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))


_REFUSAL_CHARS = 300
_MARKUP = re.compile(r"[*#_>]")

_CANNOT = (
    r"(?: can ?not| can't| could not| couldn't| won't| will not| do not| don't| did not| didn't"
    r"|(?: am|'m| was) (?:not able|unable|not permitted|not allowed) to)"
)
_WHAT_IS_ASKED_FOR = (
    r"(?:access|analy[sz]e|answer|assist|be able|comment|complete|comply|confirm|continue|create"
    r"|describe|detect|determine|discuss|display|do (?:this|that)|engage|feel comfortable|find"
    r"|fulfil+|generate|give|have (?:access|the ability)|help(?! but)|identify|interpret|load|offer"
    r"|open|process|produce|provide|receive|recogni[sz]e|respond|see|share|support|view|write)"
)
_IT_SEEMS = r"(?:it (?:appears|looks|seems)\b(?: as if| like| that)? ?)?"

_REFUSALS = (
    # English. "Sorry, we're closed" and "No picture on the wall" may begin a caption.
    r"(?:i'm|i am|we're|we are) (?:\w+ )?(?:sorry|afraid)\b[\s,.!;:—–-]*"
    r"(?:(?:but|however|i|we|this|that|the|there|as)\b|$)",
    rf"sorry[\s,.!—–-]*(?:but )?(?:i{_CANNOT}|(?:the|this) (?:image|picture|photo))\b",
    r"(?:i (?:\w+ )?apologi[sz]e|my apologies|apologies, but|unfortunately|regrettably)\b",
    rf"(?:hello|hi|thank(?:s| you)\b[^.!,]*)?[\s.,!]*(?:however, |but )?(?:i|we){_CANNOT}"
    rf" (?:\w+ ){{0,2}}?{_WHAT_IS_ASKED_FOR}\b",
    r"as an? (?:\w+ )?(?:ai|artificial intelligence|language model|assistant)\b[^.!?]*\b(?:i|my)\b",
    rf"{_IT_SEEMS}(?:there (?:is|was) )?no (?:image|picture|photo) (?:\w+ ){{0,2}}"
    r"(?:attached|available|included|provided|shared|uploaded)\b",
    rf"{_IT_SEEMS}(?:the|your) (?:image|picture|photo) (?:\w+ ){{0,3}}"
    r"(?:(?:didn't|did not|doesn't|does not) (?:display|load|upload)|failed to)\b",
    r"please (?:attach|provide|send|share|upload) (?:an?|the|your) (?:image|picture|photo)\b",
    # German
    r"(?:es )?tut mir (?:\w+ )?leid\b",
    r"entschuldig\w+(?: sie)?[\s,.!]*(?:aber|doch|ich)\b",
    r"leider\b",
    r"ich (?:kann|konnte|darf) [^.!?]*\b(?:nicht|keine?n?)\b",
    r"ich bin (?:\w+ )?nicht in der lage\b",
    r"als (?:eine? )?(?:ki|künstliche intelligenz|\w*\s?sprachmodell)\b[^.!?]*\b(?:ich|mir)\b",
    # French
    r"(?:je suis )?(?:\w+ )?désolée?[\s,.!]*(?:(?:mais|je|l'image|cette image)\b|$)",
    r"je (?:m'excuse|regrette)\b",
    r"malheureusement\b",
    r"je (?:ne (?:peux|puis|suis|parviens|vois)\b|n'ai\b)[^.!?]*\b(?:pas|aucune?)\b",
    r"il m'est impossible\b",
    r"en tant qu(?:'|e |'une )(?:\w+ )?(?:ia|intelligence artificielle|modèle|assistante?)\b[^.!?]*"
    r"\bje\b",
    # Spanish
    r"lo (?:siento|lamento)\b[\s,.!]*(?:mucho[\s,.!]*)?(?:(?:pero|no|esta)\b|$)",
    r"(?:disculp[ae]|perdón|mis disculpas)[\s,.!]*(?:pero|no)\b",
    r"(?:lamentable|desafortunada|desgraciada)mente\b",
    r"no (?:puedo|me es posible|soy capaz|tengo (?:acceso|la capacidad))\b",
    r"como (?:una? )?(?:ia|inteligencia artificial|modelo de (?:lenguaje|ia))\b[^.!?]*\bno\b",
    # Italian
    r"(?:mi (?:di)?spiace|(?:sono )?spiacente)\b[\s,.!]*(?:(?:ma|non)\b|$)",
    r"purtroppo\b",
    r"non (?:posso|riesco|sono in grado|mi è possibile|ho accesso)\b",
    r"come (?:un'? ?)?(?:ia|intelligenza artificiale|modello linguistico)\b[^.!?]*\bnon\b",
    # Portuguese
    r"(?:desculp[ae]|sinto muito|lamento|peço desculpas?)[\s,.!]*(?:(?:mas|não)\b|$)",
    r"infelizmente\b",
    r"(?:eu )?não (?:posso|consigo|sou capaz|me é possível|tenho (?:acesso|permissão))\b",
    r"como (?:uma? )?(?:ia|inteligência artificial|modelo de (?:linguagem|ia))\b[^.!?]*\bnão\b",
    # Russian
    r"к сожалению\b",
    r"(?:извините|простите|прошу прощения|мне (?:очень )?жаль)[\s,.!]*(?:(?:но|я)\b|$)",
    r"я не (?:могу|в состоянии|имею возможности|способен|вижу изображени)",
    r"как (?:\w+ ){0,2}?(?:ии|искусственный интеллект|языковая модель)\b[^.!?]*\bя\b",
    # Arabic
    r"(?:عذرا|عذرًا|آسف|أنا آسف|أعتذر|المعذرة|للأسف)",
    r"(?:أنا )?لا (?:أستطيع|يمكنني|أقدر)\b",
    r"(?:لست قادر|ليس بإمكاني|غير قادر على)",
    r"(?:بصفتي|باعتباري|كوني) (?:نموذج|ذكاء|مساعد)",
    # Chinese
    r"(?:非常|很|十分|真的)?(?:抱歉|对不起|對不起|遗憾|遺憾)",
    r"我(?:目前|暂时|暫時|现在|現在|还|還)?(?:无法|無法|不能|没法|沒法|没有办法|沒有辦法)",
    r"(?:无法|無法)(?:查看|识别|識別|描述|提供|显示|顯示|加载|載入|处理|處理|回答|满足|滿足)",
    r"作[为為](?:一[个個名款])?(?:ai|人工智[能慧]|大?型?[语語]言模型|大模型)[^。]*我",
    r"[请請]您?(?:提供|上传|上傳)[^。]{0,8}[图圖]",
    # Japanese
    r"(?:大変)?(?:申し訳|恐れ入りますが|残念ながら|ごめんなさい|すみませんが)",
    r"すみません[、。][^。]*(?:できません|できない)",
    r"(?:私は|私には|私の)[^。]*(?:できません|できない)",
    r"(?:この|その|ご提供の|提供された)?(?:画像|写真)(?:[のに]\w{1,16})?(?:を|について)"
    r"(?:表示|確認|認識|説明|識別|特定|描写|分析|処理|閲覧|見る|提供|お答え)\w{0,8}(?:できません|できない)",
    r"(?:ai|人工知能|言語モデル)(?:アシスタント|モデル)?(?:として|なので|であるため)",
    # Korean
    r"(?:정말 |대단히 )?(?:죄송|미안)(?:합니다|하지만|해요|하게도)",
    r"(?:유감스럽게도|안타깝게도)",
    r"(?:저는|제가) [^.]*수 없",
    r"(?:(?:이|해당|제공된) )?(?:이미지|사진)(?:를|을) [^.]*수 없",
    r"(?:ai|인공지능|언어 모델)(?:로서|으로서|이기|이므로)",
)
_REFUSAL = re.compile("|".join(_REFUSALS))


def _ends_in_loop(text: str) -> bool:
    """Tell whether a text ends in a unit of any length, said again and again.

    The last characters stand at the same place of the unit before: how far back they are found is
    the length of the unit, or of a part of it that is no loop itself.
    """
    least = LOOP_CHARS if " " in text[-LOOP_CHARS_WITHOUT_SPACES:] else LOOP_CHARS_WITHOUT_SPACES
    end = len(text)
    found = text.rfind(text[-_TAIL_CHARS:], 0, end - 1)
    while found >= 0:
        period = end - _TAIL_CHARS - found
        # The last time may lack its end, to the token limit or to rstrip().
        length = max(LOOP_TIMES * period - _TAIL_CHARS, least)
        if length > end:
            return False
        if text[end - length : end - period] == text[end - length + period :]:
            return True
        found = text.rfind(text[-_TAIL_CHARS:], 0, found + _TAIL_CHARS - 1)
    return False


_TAIL_CHARS = 20
"""Enough to be found only rarely where there is no loop, less than a half of the shortest loop."""


def _ends_in_much_the_same(text: str) -> bool:
    """Tell whether the end of a text says little for its length: "1. A tree. 2. A tree." """
    if len(text) < LOOP_COMPRESSION_CHARS:
        return False
    written = text[-LOOP_COMPRESSION_CHARS:].encode("utf-8", "replace")
    return len(written) > LOOP_COMPRESSION * len(zlib.compress(written))


_RANGES: dict[Script, str] = {
    "latin": "A-Za-zÀ-ɏɐ-ʯḀ-ỿⱠ-Ɀﬀ-ﬆＡ-Ｚａ-ｚ",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "devanagari": "\u0900-\u097f\ua8e0-\ua8ff",
    "thai": "\u0e00-\u0e7f",
    # Chinese, Japanese and Korean
    "cjk": "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u318f\u31a0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff",
}
"""The letters of each script, by the blocks of Unicode."""

_IN_NONE = "ªºµ"
"""Signs that count as letters, and stand in texts of any script."""


@lru_cache
def _letters_outside(scripts: tuple[Script, ...]) -> re.Pattern[str]:
    return re.compile(rf"[^\W\d_{_IN_NONE}{''.join(_RANGES[script] for script in scripts)}]+")
