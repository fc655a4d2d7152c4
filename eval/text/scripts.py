"""Scripts in which text is rendered: words, letters, the language that reads them, and fonts that have them."""

import string
from typing import Literal, NamedTuple

Name = Literal["latin", "cyrillic", "greek", "arabic", "chinese", "japanese"]


class Script(NamedTuple):
    """What is needed to render and to read a script."""

    language: str
    """Name of the language in tesseract."""
    words: str
    """Words with spaces between them."""
    letters: str
    """Letters of random strings. Those that look like another one in some font are left out."""
    digits: str
    """Digits of random strings; empty where they are not used."""
    between: str
    """What stands between words: a space, or nothing."""
    fonts: tuple[tuple[str, int], ...] = ()
    """File names of suitable fonts and the numbers of their faces, in case that matplotlib's fonts lack the script."""
    right_to_left: bool = False


SCRIPTS: dict[Name, Script] = {
    "latin": Script(
        "eng",
        (
            "the river keeps its name under every bridge while people cross with bread letters and small boats Morning "
            "light falls over quiet houses where someone writes about weather prices music and distant towns Every "
            "page has an order that readers know before they think of it Numbers follow words like children after "
            "school and nobody counts them twice"
        ),
        "abcdefghijkmnpqrstuvwxyz",
        string.digits,
        " ",
    ),
    "cyrillic": Script(
        "rus",
        (
            "река хранит своё имя под каждым мостом пока люди несут хлеб письма и маленькие лодки Утренний свет падает "
            "на тихие дома где кто-то пишет о погоде ценах музыке и далёких городах Каждая страница имеет порядок "
            "который читатель знает прежде чем думает о нём Числа идут за словами как дети после школы"
        ),
        "абвгдежиклмнпрстуфхцчшщыэюя",
        string.digits,
        " ",
    ),
    "greek": Script(
        "ell",
        (
            "το ποτάμι κρατά το όνομά του κάτω από κάθε γέφυρα ενώ οι άνθρωποι περνούν με ψωμί γράμματα και μικρές "
            "βάρκες Το πρωινό φως πέφτει πάνω σε ήσυχα σπίτια όπου κάποιος γράφει για τον καιρό τις τιμές τη μουσική "
            "και τις μακρινές πόλεις Κάθε σελίδα έχει μια τάξη που ο αναγνώστης ξέρει πριν σκεφτεί"
        ),
        "αβγδεζηθικλμνξπρστυφχψω",
        string.digits,
        " ",
    ),
    "arabic": Script(
        "ara",
        (
            "النهر يحفظ اسمه تحت كل جسر بينما يعبر الناس مع الخبز والرسائل والقوارب الصغيرة ضوء الصباح يسقط على البيوت "
            "الهادئة حيث يكتب شخص عن الطقس والأسعار والموسيقى والمدن البعيدة لكل صفحة ترتيب يعرفه القارئ قبل أن يفكر "
            "فيه الأرقام تتبع الكلمات مثل الأطفال بعد المدرسة"
        ),
        "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
        "",
        " ",
        (("NotoNaskhArabic-Regular.ttf", 0), ("NotoSansArabic-Regular.ttf", 0), ("DejaVuSans.ttf", 0)),
        right_to_left=True,
    ),
    "chinese": Script(
        "chi_sim",
        (
            "河流 名字 每天 人们 面包 信件 早晨 安静 房子 天气 价格 音乐 远方 城市 书页 读者 数字 孩子 学校 时间 "
            "工作 朋友 问题 世界 国家 今天 明年 生活 历史 文化 经济 社会 语言 电话 火车 飞机 医院 商店 花园 海洋 山谷 "
            "春季 夏季 秋季 冬季 红色 绿色 白色 黑色 东方 西方 南方 北方 左边 右边 上面 下面 里面 外面 中心"
        ),
        "的是在有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还"
        "发成事只作当想看文无开手用主行方又如前所本见经头面公同",
        "",
        "",
        (
            ("NotoSansCJK-Regular.ttc", 2),
            ("NotoSerifCJK-Regular.ttc", 2),
            ("wqy-zenhei.ttc", 0),
            ("wqy-microhei.ttc", 0),
        ),
    ),
    "japanese": Script(
        "jpn",
        (
            "川は 名前を 橋の 下で 守り 人々は パンと 手紙を 持って 渡る 朝の 光が 静かな 家に 落ちる 天気や 値段 音楽 "
            "遠い 町に ついて 書く 本の 順番を 読者は 知って いる 数字は 言葉の 後に 続き 子供たちは 学校から "
            "帰る 電車の 窓から 海が 見える 友達と 話す 時間"
        ),
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふほまみむめもやゆよらりるれろわをん"
        "アイウオキクケコサシスセソタチテトナニヌネノヒフホマミムメモヤユヨラルレロワン日本人大学生年月時分中山川田口目手足",
        "",
        "",
        (("NotoSansCJK-Regular.ttc", 0), ("NotoSerifCJK-Regular.ttc", 0), ("ipag.ttf", 0), ("ipaexg.ttf", 0)),
    ),
}
"""In a fixed order: the number of a script decides what is drawn."""
