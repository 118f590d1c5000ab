"""The words around an answer, in seven languages: "the answer is", denials, corrections, options, steps, questions."""

import re

ORDINAL = re.compile(r"(?:st|nd|rd|th)\b|[ ]?(?:番目|번째|단계)")
STEP = re.compile(
    r"\b(?:step|part|case|paso|hatua|sehemu)[ ]?#?(\d+)|(?:步骤|第|ステップ|手順|الخطوة|خطوة|단계)[ ]?(\d+)",
    re.IGNORECASE,
)
LIST_ITEM = re.compile(r"^[ \t]*(\d{1,2})[.)、:][ \t]*(?=[^\s\d])", re.MULTILINE)
SENTENCE_END = re.compile(r"[。!?؟\n]|\.(?=\s|$|[A-Z¿])")
QUESTION_END = re.compile(r"[?؟]|(?:か|까|呢|吗)[。.]")
# The names of options. Letters that also form words need a point or a bracket after them. The others may stand alone.
ORDERS = ("ABCDEFGH", "abcdefgh", "ابجد", "アイウエオカ", "가나다라마바", "①②③④⑤⑥⑦⑧")
OPTION = re.compile(
    r"(?<![^\W\d_])\(?(?:([A-Ha-hابجد])\)?[ ]?[.):、]|([アイウエオカ가나다라마바①-⑧])[).:、]?)\s*(?=-?[\d.])"
)
SPANISH = re.compile(r"[¿¡]|\b(?:el|es|los|las|del|respuesta|resultado|calcula|halla|suma)\b", re.IGNORECASE)
ANSWER = (
    r"\banswers?\b|\brespuesta\b|\bans\b|\bjibu\b|\bmajibu\b|\bjawabu\b|答案|答え|こたえ"
    r"|(?<![回解])答(?![案え])|正解|جواب|اجابة|정답|답|(?-i:\b[RA](?= ?:))"
)
RESULT = r"\bresult\b|\bresultado\b|\bmatokeo\b|得数|结果|結果|ناتج|نتيجة|결과"
SOLUTION = r"\bsolution\b|\bsolución\b|\bsuluhisho\b|解答|回答|해답|الحل|\bحل\b"
CHOICE = r"\boptions?\b|\bchoose\b|\bchoice\b|\bopción\b|\bchaguo\b|选项|選項|选|選|الخيار|선택"
IS = r"(?:\b(?:is|are|equals|es|son|ni|ndiyo|ndio)\b|是|为|為|等于|等於|は|が|은|는|이|가|هو|هي|يساوي|تساوي)"
IS_BACKWARD = r"(?:\b(?:is|es|ni|ndiyo|ndio)\b|是|が|は|이|가|هو|هي)"
MARKS = r"[\s*_\"'“”«»「『【()\[\]】」』⟦、,=≈~]{0,12}"
# What may stand between a colon or "is" and the number: a currency, "about" and "in total", negative signs in words.
LEAD = (
    r"(?:(?:(?:US|R)?\$|\b(?:Ksh|Tsh|Sh|Rs|USD|EUR)\b\.?|[-±—] {0,2}\(?|\b(?:about|approximately|roughly|exactly"
    r"|only|total"
    r"|total of|in total"
    r"|unos|unas|aproximadamente|exactamente|en total|takriban|jumla ya|jumla|kama|negative|minus|menos|hasi|elfu"
    r"|milioni)\b"
    r"|約|约|大约|大約|およそ|全部で|合計で?|一共|总共|共|约为|약|총|모두|حوالي|تقريبا|سالب|ناقص|负|負の?"
    r"|マイナス|마이너스)\s*){0,3}"
)
NUMBER = rf"{LEAD}(?P<target>-?\.?\d)"
LETTER = (
    r"(?P<target>(?-i:[A-H](?![A-Za-z'(])|[a-h](?=\s*[).]|\s*$))|[ابجد](?!\w)|[アイウエオカ](?![ァ-ヶー])"
    r"|[가나다라마바](?=\)|번|입니다|이다|예요)|[①-⑧])"
)


def forward(nouns: str, target: str) -> re.Pattern:
    """Match "noun ... is ... target" or "noun: target". Words may follow only "is", unlike "Answer: We have 12"."""
    filler, gap = r"[^\n.。!?؟:=]{0,60}?", r"(?:[^\W\d_]{1,20}[ ,]{1,2}){0,3}?[^\W\d_]{0,20}[ ]?"
    link = rf"(?:{filler}(?:{IS}{MARKS}:?{MARKS}{gap}|[:=→]){MARKS}|{MARKS})"
    return re.compile(rf"(?:{nouns}){link}{target}", re.IGNORECASE)


def backward(nouns: str) -> re.Pattern:
    """Match the text after the target in "390 is the answer"."""
    between = r"(?:(?:the|our|my|la|el|final|correct|right|最终的?|最終的?|正しい|최종|ال) ?){0,3}"
    return re.compile(rf" ?[)\]⟧]? ?{IS_BACKWARD} ?{between}(?:{nouns})", re.IGNORECASE)


# Words for "answer" come before words for "result". Only a letter may follow a word for "option".
# After "Solution:" a worked solution may follow, so the number must stand right after the colon or "is".
SOLVED = re.compile(rf"(?:{SOLUTION}) ?(?:{IS}|[:=→】」])(?!\s*\n){MARKS}{NUMBER}", re.IGNORECASE)
NUMBER_MARKERS = [(forward(nouns, NUMBER), backward(nouns)) for nouns in (ANSWER, RESULT)]
LETTER_MARKERS = [forward(nouns, LETTER) for nouns in (ANSWER, RESULT, CHOICE)]
# The text ends just before the answer. "That is the answer" and "Answer:" alone do not match.
UNFINISHED = re.compile(rf"(?:{ANSWER})[^\n.。!?؟:=]{{0,60}}?{IS}{MARKS}:?{MARKS}$", re.IGNORECASE)
# The text ends within a calculation or a list.
CUT_OFF = re.compile(r"(?<!/)[=+\-×÷*/^(→,、،] *$")
DENIED = re.compile(
    r"\b(?:because|since|not|no|porque|pues|kwa sababu|si|sio)\b|n't\b|因为|不是|不等|ため|ない|لان|ليس|때문|아니",
    re.IGNORECASE,
)
STATED = re.compile(
    r"(?:[=:→≈≡]|\b(?:is|equals?|equal to|gives?|get|leaves?|remainder|es|da|quedan?|sobran?|resto|igual a"
    r"|ni|baki|sawa na)\b|是|为|為|等于|等於|得到?|剩下?|余数?|余り|は|은|는|나머지|هو|هي|يساوي|تساوي|باقي)"
    r"[\s*_\"'“«(\[⟦]*$",
    re.IGNORECASE,
)
LINKS = re.compile(rf"{IS}|\b(?:mod|mm|cm|km|kg|equal to|igual a|sawa na|gives)\b|厘米", re.IGNORECASE)
HEADING = (
    r"(?:q|question|problem|exercise|pregunta|problema|ejercicio|swali|zoezi|tatizo)\b"
    r"(?:[ ]*(?:la[ ]+)?#?\d*[ ]*(?:[:.)]|[ *]*(?=\n))|[ ]+(?:la[ ]+)?\d+\b)"
    r"|q\d+[ ]*[:.)]|(?:human|user|usuario|用户|用戶)[ ]*:"
    r"|(?:问题|問題|题目|題目|例题|例題|质问|質問|题|題|问|問|السؤال|سؤال|المسالة|مسالة|질문|문제)"
    r"[ ]*\d*[ ]*(?:[:.)、]|[ *]*(?=\n))"
    r"|第[ ]*[\d一二三四五六七八九十]+[ ]*[题題问問]"
)
# A heading matches at the beginning of a line or sentence. A capitalised word with a colon also matches within a line.
NEW_QUESTION = re.compile(
    rf"(?:^|(?<=[.。!?؟])|(?<=[.。!?؟] ))[ \t>*\-]*(?:{HEADING})"
    r"|(?<=\s)(?:(?-i:Q|Question|Pregunta|Swali)|问题|問題|السؤال|سؤال|질문|문제) ?\d* ?:",
    re.IGNORECASE | re.MULTILINE,
)
# --- denials and corrections
DENIED_BEFORE = re.compile(
    r"(?:\bnot(?: simply| just| equal to)?|n't(?: be| equal)?|\bcannot be|instead of|rather than|≠|\bno (?:es|son"
    r"|era|sería)"
    r"|\ben (?:vez|lugar) de|不是|并非|而非|不等于|不为|ليس|ليست|لا يساوي|بدلا من|\bs(?:i|io|iyo)"
    r"|badala ya)[ *\"'“(]*$",
    re.IGNORECASE,
)
DENIED_AFTER = re.compile(
    r"[)\]⟧*\"'” ]*(?:[^\W\d_]{1,3}?(?:では|じゃ)(?:なく|な|あり)|(?:では|じゃ)(?:なく|な|あり)|[はが]?(?:間違い"
    r"|誤り|違い)"
    r"|(?:と|だと)(?:思|考え)(?:うかも|いがち|えがち|ったが|いました)|[가-힣]{0,2}(?:이|가|은|는)? ?(?:아니|아닙"
    r"|틀렸|틀린|잘못)"
    r"|(?:이)?라고 (?:생각|착각)|[^\W\d]{0,2}(?:是|为)?(?:不对|错的|错误|不正确|不是答案)"
    r"|(?:is|was|would be|seems|isn't|is not)?,? ?(?:clearly |obviously )?(?:wrong|incorrect|mistaken|not (?:right"
    r"|correct|the answer))"
    r"|(?:es|era|está|no es) (?:la )?(?:incorrect|errón|equivocad|mal\b|fals|correct|respuesta)|(?:هو |هي "
    r"|هذا )?(?:خطا|غير صحيح|ليس)"
    r"|(?:si sahihi|sio|siyo|si jibu|ni makosa|si kweli))",
    re.IGNORECASE,
)
# "You might think the answer is 12": what is only thought or supposed in the sentence before.
SUPPOSED = re.compile(
    r"\b(?:might|may|could|would|can) (?:easily )?(?:be tempted|think|say|guess|assume|expect|believe)|\b(?:seems"
    r"|appears|tempting"
    r"|suppose|supposedly|at first glance|looks like|I (?:first )?thought)\b|\bif the answer\b|(?:可能|也许|或许)(?:会"
    r"|有人)?(?:会)?(?:认为|以为|觉得|说)"
    r"|有人(?:会)?(?:认为|以为|觉得|说)|看起来|看似|\b(?:podría|podrías|puede|puedes|parece|parecería|pensé"
    r"|creía)\b|قد (?:تظن|يظن"
    r"|تعتقد|يعتقد|يبدو)"
    r"|يبدو ان|\b(?:unaweza (?:kufikiri|kudhani)|huenda|inaonekana|nilidhani)\b",
    re.IGNORECASE,
)
# The writer takes back what stands before. After a weak one the same answer may be given again.
CORRECTED = re.compile(
    r"\bI(?: have|'ve)? (?:made|did) (?:a|an) (?:\w+ )?(?:mistake|error)|\bI was wrong|\bthat(?:'s| is"
    r"| was) (?:wrong|incorrect|not right)"
    r"|\bmy mistake|\bcorrection\b ?:|\bmiscalculated|\bscratch that|me (?:he )?equivoqu|me he equivocado"
    r"|\bestá mal\b|\bcorrijo\b|\bcorrección\b ?:"
    r"|\brectifico\b|cometí un error|算错|弄错|搞错|说错|更正|纠正|我错了|不对[,，。!]|間違え|訂正|計算ミス"
    r"|間違いでした|違いました|틀렸|실수|정정"
    r"|잘못 (?:계산|말|썼)|اخطات|خطا في|تصحيح|\bn[ia]li?kosea\b|\bnimekosea\b|\bsahihisho\b|\bmarekebisho\b"
    r"|nimefanya kosa|nilifanya kosa",
    re.IGNORECASE,
)
RECONSIDERED = re.compile(
    r"(?:^|(?<=[.。!?؟\n…])|(?<=[.。!?؟\n…] ))[\s*]*(?:(?:oh |but |hmm,? |ah,? )?(?:wait|actually|hold on|no|sorry"
    r"|oops)\b|espera|perdón|en realidad|no,"
    r"|等等|等一下|不[,，]|抱歉|いや|待って|すみません|잠깐|아니[,요]|죄송|انتظر|لا[,،]|عفوا|معذرة|في الواقع"
    r"|subiri|hapana|samahani)",
    re.IGNORECASE,
)
# Where the earlier problems of a few-shot prompt end: the last of several questions.
ASKED_BEFORE = re.compile(rf"(?:{ANSWER})[^\n:]{{0,20}}[:：][^\n]*\S|####", re.IGNORECASE)


def denied(text: str, begin: int, end: int) -> bool:
    """Whether the number at [begin, end) is denied: "not 12", "12ではなく", "12 is wrong"."""
    if DENIED_BEFORE.search(text[max(0, begin - 24) : begin]):
        return True
    after = text[end : end + 48]
    return bool(DENIED_AFTER.match(after)) and not re.match(r"[ ]*es (?:correct|la respuesta)", after, re.IGNORECASE)


def supposed(text: str, begin: int) -> bool:
    """Whether the sentence up to `begin` only supposes what it says: "You might think that"."""
    sentence = re.split(r"[.。!?؟\n;]|, ?(?:but|pero|لكن|بل|lakini)\b|但", text[max(0, begin - 120) : begin])[-1]
    return bool(SUPPOSED.search(sentence))
