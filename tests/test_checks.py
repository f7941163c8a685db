"""Answers of every kind, in several languages, and what the checks make of them."""
# ruff: noqa: RUF001  # texts in many scripts

import pytest

from captioning.checks import is_echo, is_in_other_script, is_refusal, is_repeating, judge
from captioning.engine.questions import Ending
from captioning.outcomes import CaptionOutcome
from captioning.prompts import DESCRIBE
from pipeline.recipe import Script

DOG = (
    "The image is a vibrant photograph of a golden retriever lying on a wooden porch in the late "
    "afternoon. The dog's fur is thick and slightly wavy, ranging from pale cream on its chest to "
    "a deep honey colour along its back. Its head rests on its front paws, and its dark brown eyes "
    "look directly at the camera with a calm, attentive expression. To the left of the dog stands "
    "a terracotta pot with red geraniums, some of whose petals have fallen onto the weathered "
    "planks. Behind it, a white railing runs across the frame, and beyond the railing a lawn "
    "slopes down to a row of birch trees, blurred by the shallow depth of field. Warm light falls "
    "from the right, casting long shadows and giving the scene a peaceful, nostalgic mood."
)
VILLAGE_RU = (
    "Картина изображает зимний пейзаж в небольшой русской деревне. На переднем плане видна узкая "
    "дорога, покрытая снегом, по которой идёт пожилая женщина в тёмном пальто и красном платке. "
    "Слева от дороги стоят деревянные дома с резными наличниками, из труб которых поднимается дым. "
    "Справа растут высокие ели, ветви которых согнулись под тяжестью снега. На заднем плане "
    "возвышается белая церковь с золотым куполом, освещённая последними лучами заходящего солнца."
)
STREET_ZH = (
    "这张照片展示了一条古老的石板街道，两旁是传统的木结构房屋，屋檐下挂着红色的灯笼。街道中央有一位穿着"
    "蓝色布衣的老人，他正推着一辆自行车缓缓前行，车篮里放着新鲜的蔬菜。左侧的店铺门口摆放着竹编的篮子和"
    "陶瓷器皿，右侧的墙壁上爬满了绿色的藤蔓。远处可以看到一座石拱桥横跨在小河之上。"
)
LINES = ["The quick brown", "fox jumps over", "the lazy dog and", "nobody was there", "to see it"]
LINES += ["on a Sunday in", "late September", "when leaves had", "turned to gold", "and rain began"]
TEN_LINES = "The image shows ten lines of text on beige ground. " + " ".join(
    f'The line "{line}" is in the same medium-sized black cursive font.' for line in LINES
)
TILES = "The image shows a seamless tiled pattern. " + " ".join(
    f"In the {row} row there is a {first}, a {second}, a {first}, and a {second}."
    for row, first, second in [
        ("first", "blue star", "red circle"),
        ("second", "red circle", "blue star"),
        ("third", "blue star", "red circle"),
        ("fourth", "red circle", "blue star"),
    ]
)
REFRAIN = "Row, row, row your boat, gently down the stream, merrily, merrily, merrily, merrily, "
POEM = (
    f'A page of a song book with the text "{REFRAIN}life is but a dream. {REFRAIN}life is but a '
    f"dream. {REFRAIN}if you see a crocodile, don't forget to scream.\" in a round blue font."
)

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I cannot identify people in images.",
    "I'm sorry.",
    "I am really sorry, but this image appears to contain sensitive content.",
    "Sorry, but I can't assist with that request.",
    "Sorry, the image is too blurry to describe.",
    "I apologize, but I am unable to view images.",
    "I can't provide a description of this image because it shows a real person.",
    "I cannot see the image you are referring to. Could you upload it again?",
    "I'm unable to view the picture. Please describe it to me in words.",
    "I'm not able to identify the man, but I can describe the room: it has white walls.",
    "I won't be able to describe this content.",
    "I do not have the ability to see images.",
    "Thank you for the image! However, I cannot identify the person in it.",
    "Unfortunately, the image did not come through.",
    "As an AI language model, I don't have eyes and cannot see pictures.",
    "**I'm sorry**, but I can't describe this image.",
    "It seems that no image was provided.",
    "There is no image attached to your message.",
    "It looks like the image didn't load.",
    "Please upload the image you would like me to describe.",
    "Es tut mir leid, aber ich kann dieses Bild nicht beschreiben.",
    "Tut mir sehr leid, dabei kann ich nicht helfen.",
    "Leider kann ich die Person auf dem Bild nicht identifizieren.",
    "Ich kann Ihnen bei dieser Anfrage nicht helfen.",
    "Als KI-Sprachmodell habe ich keinen Zugriff auf Bilder, daher kann ich nichts sagen.",
    "Je suis désolé, mais je ne peux pas décrire cette image.",
    "Désolée, je ne peux pas vous aider.",
    "Je ne suis pas en mesure d'identifier les personnes sur cette photo.",
    "En tant qu'intelligence artificielle, je ne vois pas les images.",
    "Lo siento, pero no puedo ayudar con eso.",
    "No puedo identificar a la persona de la imagen.",
    "Como modelo de lenguaje, no puedo ver imágenes.",
    "Mi dispiace, ma non posso descrivere questa immagine.",
    "Non sono in grado di identificare le persone nella foto.",
    "Desculpe, mas não posso ajudar com isso.",
    "Infelizmente, não consigo ver a imagem.",
    "Извините, но я не могу описать это изображение.",
    "К сожалению, я не могу определить, кто изображён на фотографии.",
    "Я не могу помочь с этим запросом.",
    "عذرًا، لا أستطيع وصف هذه الصورة.",
    "أنا آسف، لكن لا يمكنني المساعدة في ذلك.",
    "لا يمكنني التعرف على الأشخاص في الصور.",
    "抱歉，我无法识别图片中的人物。",
    "很抱歉，我不能协助满足该请求。",
    "對不起，我無法描述這張圖片。",
    "作为一个人工智能语言模型，我无法查看图片。",
    "申し訳ありませんが、この画像を説明することはできません。",
    "この画像に写っている人物を特定することはできません。",
    "AIとして、個人を識別することはできません。",
    "죄송합니다. 이 이미지를 설명할 수 없습니다.",
    "저는 이미지 속 인물을 식별할 수 없습니다.",
]

CAPTIONS = [
    DOG,
    "A red barn.",
    "The sign reads \"I'm sorry, I can't help you\" in red letters on a white board.",
    "\"I'm sorry, but I can't\" is written in blue chalk on a grey wall beside a door.",
    "A handwritten note on yellow paper. It says 'I'm sorry, I cannot come today'.",
    "Sorry We're Closed sign on the glass door of a bakery, with loaves behind it.",
    "Sorry, we're closed, says a wooden board that hangs from a nail.",
    "I'm Sorry for Your Loss card with white lilies on a silver ground.",
    "I cannot help but notice the old bicycle, which leans against a blue wall.",
    'A grey square with the words "No image available" in white.',
    "There is no picture on the wall, only a pale rectangle where one once hung.",
    "As an AI-generated artwork, the picture shows a castle floating above clouds.",
    "No people are visible in the image, only an empty street at night.",
    "An apology is written in the sand: the word SORRY in large letters.",
    "A man helps a woman who cannot see cross the street.",
    "Please do not feed the ducks, a green sign at the edge of a pond reads.",
    "A picture frame without a picture, provided with a gold border, hangs on a wall.",
    "Hello Kitty stands beside a pink suitcase.",
    "Ein Kind kann den Ball nicht erreichen, der auf dem Dach liegt.",
    "Als Kind verkleidet, steht ein Mann auf der Bühne, und ich sehe ihn von hinten.",
    "Auf dem Schild steht „Es tut mir leid“ in roter Schrift.",
    "Une femme désolée regarde la pluie par la fenêtre d'un café.",
    "Una mujer que no puede entrar espera ante una puerta azul.",
    "Un uomo non riesce ad aprire l'ombrello sotto la pioggia.",
    "Um cartaz com a frase «Desculpe, mas estamos fechados» na porta de uma loja.",
    VILLAGE_RU,
    "На вывеске написано «Извините, но мы закрыты».",
    "صورة لرجل مسن يجلس أمام متجر صغير ويقرأ جريدة.",
    STREET_ZH,
    "一块白色的牌子上写着“对不起，我们已打烊”，挂在木门上。",
    "白い壁の前に赤い自転車が置かれている。人物の顔は確認できません。",
    "「すみません、本日休業」と書かれた紙が店のドアに貼られている。",
    "눈 덮인 산 아래 작은 나무집이 있고, 문 앞에 빨간 우산이 놓여 있다.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_known_by_its_beginning(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", [*CAPTIONS, TEN_LINES, TILES, POEM])
def test_a_caption_is_no_refusal(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        DOG[:300] + " very" * 40,
        DOG + " The scene is calm and quiet." * 12,
        DOG + " The scene is calm and quiet." * 12 + " The scene is c",
        DOG[:200] + ", a small tree, a large tree" * 9,
        DOG + "\n" + f"{DOG[:230]}\n" * 3,
        "- a tree\n" * 30,
        'A wall of signs: "Open", ' + '"Open", ' * 30,
        'The page reads "' + "la " * 80,
        "A white page. " + "_" * 200,
        "\n".join(f"{number}. A red car parked on the street." for number in range(1, 40)),
        "".join(f"There is a {colour} tree on the left. " for colour in ["red", "green"] * 10),
        VILLAGE_RU + " Снег белый и чистый." * 8,
        STREET_ZH + "远处可以看到一座石拱桥，" * 6,
        "红色" * 60,
        STREET_ZH + "哈" * 60,
        "赤い花と" * 15,
        "ต้นไม้" * 20,
        "나무가 있고 " * 30,
        "صورة جميلة " * 20,
    ],
)
def test_a_loop_at_the_end_is_repeating(text: str) -> None:
    assert is_repeating(text)


@pytest.mark.parametrize(
    "text",
    [
        *CAPTIONS,
        *REFUSALS,
        TEN_LINES,
        TILES,
        POEM,
        "The flag has thirteen stripes: " + "red, white, " * 6 + "red.",
        'A poster on which the word "LOVE" is repeated: "' + "LOVE " * 20 + '" in pink on black.',
        'A comic panel in which a man laughs "HA HA HA HA HA HA HA HA HA HA HA HA"',
        "The keys are Esc, F1, F2, F3, F4, F5, F6, F7, F8, F9, F10, F11 and F12.",
        "A calendar of May with the days " + ", ".join(str(day) for day in range(1, 32)) + ".",
        "Terraced houses, row upon row upon row upon row upon row.",
        "A dotted line runs across the page " + "." * 30,
        "一排红灯笼，一排红灯笼，又一排红灯笼。",
        "",
        "a",
    ],
)
def test_lists_patterns_and_poems_are_not(text: str) -> None:
    assert not is_repeating(text)


OWN_PROMPT = "Image:\n\nSay what you see, in French and in no more than fifty words."


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (DESCRIBE.text, DESCRIBE.text),
        ("describe the image in detail, using one paragraph", DESCRIBE.text),
        (f"**{DESCRIBE.text}** {DOG}", DESCRIBE.text),
        (f"Prompt: {DESCRIBE.text}\n{DOG}", DESCRIBE.text),
        ("Describe the image in", DESCRIBE.text),
        ("Say what you see, in French and in no more than fifty words. Un chien.", OWN_PROMPT),
        ("请用一段话详细描述这张图片。", "请用一段话详细描述这张图片。"),
        ("描述图片", "描述图片"),
    ],
)
def test_an_echo_begins_with_the_prompt(text: str, prompt: str) -> None:
    assert is_echo(text, prompt)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (DOG, DESCRIBE.text),
        ("Describe", DESCRIBE.text),
        ("The image in detail.", DESCRIBE.text),
        (f"A white slide with the words '{DESCRIBE.text}'", DESCRIBE.text),
        ("Image of a dog on a porch.", OWN_PROMPT),
        ("描述图片的文字写在一张纸上", "描述图片"),
        # A caption may begin with the text of the picture, which the prompt quotes.
        (
            '"The quick brown fox jumps over the lazy dog" is written in red.',
            'Transcribe:\n\n"The quick brown fox jumps over the lazy dog"\n\nDescribe the rest.',
        ),
        ("", DESCRIBE.text),
        (DOG, ""),
    ],
)
def test_a_caption_is_no_echo(text: str, prompt: str) -> None:
    assert not is_echo(text, prompt)


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        (STREET_ZH, ["latin"]),
        (VILLAGE_RU, ["latin"]),
        (DOG, ["cyrillic"]),
        (DOG, ["cjk"]),
        (f"{DOG[:400]} {STREET_ZH}", ["latin"]),
        ("Изображение: a dog", ["latin"]),
        ("“禁止吸烟”", ["latin"]),
        ("สุนัขสีน้ำตาลนอนอยู่บนพื้นไม้", ["latin", "cjk"]),
        ("एक कुत्ता बरामदे पर लेटा है", ["latin"]),
        ("Ένας σκύλος στη βεράντα", ["latin", "cyrillic"]),
        ("כלב שוכב על המרפסת", ["arabic"]),
        ("صورة لرجل مسن", ["latin"]),
    ],
)
def test_a_caption_in_another_script_is_known(text: str, scripts: list[Script]) -> None:
    assert is_in_other_script(text, scripts)


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        (DOG, ["latin"]),
        (STREET_ZH, ["cjk"]),
        (VILLAGE_RU, ["latin", "cyrillic"]),
        ("Ein Mädchen mit Hut steht auf der Straße. Çocuk, żółty, đường phố.", ["latin"]),
        ("A banner reads “热烈欢迎各位来宾参加本次国际学术会议” in gold on red silk.", ["latin"]),
        ("A page that begins “床前明月光，疑是地上霜，举头望明月，低头思故乡", ["latin"]),
        ("A shop sign shows the characters 東京 in white on a blue ground.", ["latin"]),
        ("The plaque says «Памятник защитникам Отечества» in bronze letters.", ["latin"]),
        ("The label '緑茶' and the label ‘抹茶’ stand side by side.", ["latin"]),
        ('A ruler of 12" beside the letters α and β on a blackboard.', ["latin"]),
        ("白い犬が「WELCOME HOME」と書かれたマットの上に座っている。", ["cjk"]),
        ("눈 덮인 산 아래 작은 나무집이 있다.", ["cjk"]),
        ("एक कुत्ता बरामदे पर लेटा है", ["devanagari"]),
        ("12:45, 21 º", ["cyrillic"]),
        ("", ["latin"]),
    ],
)
def test_quoted_text_and_names_may_be_in_another(text: str, scripts: list[Script]) -> None:
    assert not is_in_other_script(text, scripts)


@pytest.mark.parametrize(
    ("ending", "text", "outcome"),
    [
        (Ending.STOP, DOG, CaptionOutcome.OK),
        (Ending.LENGTH, DOG[:-20], CaptionOutcome.TRUNCATED),
        (Ending.NOT_TAKEN, "", CaptionOutcome.PICTURE_FAILED),
        (Ending.FAILED, "", CaptionOutcome.ENGINE_FAILED),
        (Ending.WITHHELD, DOG, CaptionOutcome.REFUSED),
        (Ending.STOP, "", CaptionOutcome.EMPTY),
        (Ending.STOP, " \n\u200b", CaptionOutcome.EMPTY),
        (Ending.LENGTH, "!" * 256, CaptionOutcome.EMPTY),
        (Ending.STOP, DESCRIBE.text, CaptionOutcome.ECHO),
        (Ending.LENGTH, f"{DESCRIBE.text} " * 20, CaptionOutcome.ECHO),
        (Ending.STOP, "I'm sorry, but I can't help with that.", CaptionOutcome.REFUSED),
        (Ending.STOP, "抱歉，我无法识别图片中的人物。", CaptionOutcome.REFUSED),
        (Ending.LENGTH, "I can't see the image. " * 30, CaptionOutcome.REFUSED),
        (Ending.LENGTH, DOG + " The dog sleeps." * 30, CaptionOutcome.REPEATING),
        (Ending.LENGTH, "红色" * 100, CaptionOutcome.REPEATING),
        (Ending.STOP, STREET_ZH, CaptionOutcome.WRONG_SCRIPT),
        (Ending.LENGTH, STREET_ZH, CaptionOutcome.WRONG_SCRIPT),
    ],
)
def test_the_first_outcome_that_holds_counts(
    ending: Ending, text: str, outcome: CaptionOutcome
) -> None:
    assert judge(ending, text, DESCRIBE.text, ["latin"]) is outcome


@pytest.mark.parametrize(
    "text",
    [
        "<think>So, the user wants a description of the picture. Let me",
        "Got it, a cat on a sofa.</think>\n\nA grey cat lies on a green sofa.",
        "<think>\n\n</think>\n\nA grey cat lies on a green sofa.",
    ],
)
def test_thinking_is_no_caption(text: str) -> None:
    for ending in (Ending.STOP, Ending.LENGTH):
        assert judge(ending, text, "Describe.", ["latin"]) is CaptionOutcome.THINKING


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_in_any_of_the_scripts_are_ok(text: str) -> None:
    scripts: list[Script] = ["latin", "cyrillic", "arabic", "cjk"]
    assert judge(Ending.STOP, text, DESCRIBE.text, scripts) is CaptionOutcome.OK
