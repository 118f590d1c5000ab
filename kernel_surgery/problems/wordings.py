"""The wordings of each kind of problem in seven languages, one per split.

`WORDINGS[kind][language]` is a triple (fit, dev, test). Within one split, the seven wordings of a kind have the same
meaning and the same final mark: a full stop for fit and test, a question mark for dev. Activations are read at the last
prompt token, so another mark would add a difference in punctuation to the difference in language.

No digit is followed by a particle whose form depends on the spoken number, such as Korean 을/를 and 와/과.
"""

WORDINGS: dict[str, dict[str, tuple[str, str, str]]] = {
    "plus": {
        "zh": ("请求出 {a} + {b} 的结果。", "{a} 加 {b} 等于多少？", "把 {a} 和 {b} 相加。"),
        "en": ("Work out {a} + {b}.", "How much is {a} plus {b}?", "Add {a} and {b} together."),
        "es": ("Halla el resultado de {a} + {b}.", "¿Cuánto es {a} más {b}?", "Suma los números {a} y {b}."),
        "ar": ("أوجد ناتج {a} + {b}.", "كم يساوي {a} زائد {b}؟", "اجمع العددين {a} و {b}."),
        "ja": ("{a} + {b} を計算してください。", "{a} 足す {b} はいくつですか？", "{a} と {b} を足しなさい。"),
        "ko": ("{a} + {b}의 값을 구하시오.", "{a} 더하기 {b}의 값은 얼마입니까?", "두 수 {a}, {b}의 합을 쓰시오."),
        "sw": ("Tafuta jibu la {a} + {b}.", "{a} jumlisha {b} ni ngapi?", "Jumlisha namba {a} na {b}."),
    },
    "times": {
        "zh": ("请求出 {a} × {b} 的结果。", "{a} 乘以 {b} 等于多少？", "把 {a} 和 {b} 相乘。"),
        "en": ("Work out {a} × {b}.", "How much is {a} times {b}?", "Multiply {a} and {b} together."),
        "es": ("Halla el resultado de {a} × {b}.", "¿Cuánto es {a} por {b}?", "Multiplica los números {a} y {b}."),
        "ar": ("أوجد ناتج {a} × {b}.", "كم يساوي {a} مضروبا في {b}؟", "اضرب العددين {a} و {b}."),
        "ja": ("{a} × {b} を計算してください。", "{a} 掛ける {b} はいくつですか？", "{a} と {b} を掛けなさい。"),
        "ko": ("{a} × {b}의 값을 구하시오.", "{a} 곱하기 {b}의 값은 얼마입니까?", "두 수 {a}, {b}의 곱을 쓰시오."),
        "sw": ("Tafuta jibu la {a} × {b}.", "{a} mara {b} ni ngapi?", "Zidisha namba {a} na {b}."),
    },
    "combinatorics": {
        "zh": (
            "请计算组合数 C({n}, {k})。",
            "从 {n} 个物体中选出 {k} 个，共有多少种选法？",
            "写出组合数 C({n}, {k}) 是多少。",
        ),
        "en": (
            "Compute the binomial coefficient C({n}, {k}).",
            "From {n} objects, in how many ways can {k} be chosen?",
            "Give the number of combinations C({n}, {k}).",
        ),
        "es": (
            "Calcula el coeficiente binomial C({n}, {k}).",
            "De {n} objetos, ¿de cuántas maneras se pueden elegir {k}?",
            "Di el número de combinaciones C({n}, {k}).",
        ),
        "ar": (
            "احسب معامل ذات الحدين C({n}, {k}).",
            "من بين {n} من الأشياء، بكم طريقة يمكن اختيار {k}؟",
            "اذكر عدد التوافيق C({n}, {k}).",
        ),
        "ja": (
            "二項係数 C({n}, {k}) を計算してください。",
            "{n} 個の物から {k} 個を選ぶ方法は何通りですか？",
            "組合せの数 C({n}, {k}) を答えなさい。",
        ),
        "ko": (
            "이항계수 C({n}, {k})의 값을 계산하시오.",
            "서로 다른 {n}개에서 {k}개를 고르는 방법은 몇 가지입니까?",
            "조합의 수 C({n}, {k})의 값을 쓰시오.",
        ),
        "sw": (
            "Kokotoa idadi ya michanganyiko C({n}, {k}).",
            "Kati ya vitu {n}, kuna njia ngapi za kuchagua vitu {k}?",
            "Taja idadi ya kombinesheni C({n}, {k}).",
        ),
    },
    "modular": {
        "zh": ("请求出 {a} 除以 {b} 所得的余数。", "{a} 除以 {b}，还剩多少？", "用 {a} 除以 {b}，写出余数。"),
        "en": (
            "Find the remainder of {a} divided by {b}.",
            "If {a} is divided by {b}, what is left over?",
            "Divide {a} by {b} and give the remainder.",
        ),
        "es": (
            "Halla el resto de dividir {a} entre {b}.",
            "Si se divide {a} entre {b}, ¿cuánto sobra?",
            "Divide {a} entre {b} y da el resto.",
        ),
        "ar": (
            "أوجد باقي قسمة {a} على {b}.",
            "إذا قسمنا {a} على {b}، فكم يتبقى؟",
            "اقسم {a} على {b} واذكر الباقي.",
        ),
        "ja": (
            "{a} を {b} で割った余りを求めてください。",
            "{a} を {b} で割ると、いくつ余りますか？",
            "{a} を {b} で割り、余りを答えなさい。",
        ),
        "ko": (
            "{a} 나누기 {b}의 나머지를 구하시오.",
            "{a} 나누기 {b}에서 얼마가 남습니까?",
            "{a} 나누기 {b}에서 남는 수를 쓰시오.",
        ),
        "sw": (
            "Tafuta baki la {a} kugawanywa kwa {b}.",
            "Ukigawanya {a} kwa {b}, kinabaki kiasi gani?",
            "Gawanya {a} kwa {b} kisha toa baki.",
        ),
    },
    "geometry": {
        "zh": (
            "长方形的长是 {w}，宽是 {h}，请求它的面积。",
            "一块长 {w}、宽 {h} 的长方形地有多大？",
            "已知长方形两边为 {w} 和 {h}，计算面积。",
        ),
        "en": (
            "Find the area of a rectangle of length {w} and width {h}.",
            "How large is a rectangular field that is {w} long and {h} wide?",
            "The sides of a rectangle are {w} and {h}; compute its area.",
        ),
        "es": (
            "Halla el área de un rectángulo de largo {w} y ancho {h}.",
            "¿Qué superficie tiene un campo rectangular de {w} de largo y {h} de ancho?",
            "Los lados de un rectángulo miden {w} y {h}; calcula su área.",
        ),
        "ar": (
            "أوجد مساحة مستطيل طوله {w} وعرضه {h}.",
            "ما مساحة حقل مستطيل يبلغ طوله {w} ويبلغ عرضه {h}؟",
            "ضلعا مستطيل هما {w} و {h}؛ احسب مساحته.",
        ),
        "ja": (
            "縦 {w}、横 {h} の長方形の面積を求めてください。",
            "長さ {w}、幅 {h} の長方形の畑はどのくらいの広さですか？",
            "長方形の二辺を {w} と {h} として、面積を計算しなさい。",
        ),
        "ko": (
            "가로 {w}, 세로 {h}인 직사각형의 넓이를 구하시오.",
            "길이 {w}, 너비 {h}인 직사각형 밭은 얼마나 넓습니까?",
            "직사각형의 두 변이 {w}, {h}일 때 넓이를 계산하시오.",
        ),
        "sw": (
            "Tafuta eneo la mstatili wenye urefu {w} na upana {h}.",
            "Shamba la mstatili lenye urefu {w} na upana {h} lina ukubwa gani?",
            "Pande za mstatili ni {w} na {h}; kokotoa eneo lake.",
        ),
    },
    "sequences": {
        "zh": (
            "等差数列的首项是 {a1}，公差是 {d}，请求前 {n} 项的和。",
            "从 {a1} 开始每次加 {d}，前 {n} 个数的总和是多少？",
            "数列以 {a1} 为首项、以 {d} 为公差，把前 {n} 项加起来。",
        ),
        "en": (
            "An arithmetic progression has first term {a1} and step {d}: find the sum of its first {n} terms.",
            "Starting at {a1} and adding {d} each time, what is the total of the first {n} numbers?",
            "A sequence begins with {a1} and grows by {d}; add up its first {n} terms.",
        ),
        "es": (
            "Una progresión aritmética tiene primer término {a1} y paso {d}: "
            "halla la suma de sus primeros {n} términos.",
            "Empezando en {a1} y sumando {d} cada vez, ¿cuál es el total de los primeros {n} números?",
            "Una sucesión empieza con {a1} y crece en {d}; suma sus primeros {n} términos.",
        ),
        "ar": (
            "متتالية حسابية حدها الأول {a1} وأساسها {d}: أوجد مجموع أول {n} من حدودها.",
            "إذا بدأنا من {a1} وأضفنا {d} في كل مرة، فما مجموع أول {n} من الأعداد؟",
            "تبدأ متتالية بالعدد {a1} وتزداد بمقدار {d}؛ اجمع أول {n} من حدودها.",
        ),
        "ja": (
            "初項 {a1}、公差 {d} の等差数列の最初の {n} 項の和を求めてください。",
            "{a1} から始めて毎回 {d} を足すとき、最初の {n} 個の数の合計はいくつですか？",
            "数列が {a1} から始まり {d} ずつ増えるとき、最初の {n} 項を足しなさい。",
        ),
        "ko": (
            "첫째항 {a1}, 공차 {d}인 등차수열의 처음 {n}개 항의 합을 구하시오.",
            "{a1}부터 시작하여 매번 {d}씩 더하면 처음 {n}개 수의 총합은 얼마입니까?",
            "수열이 {a1}에서 시작하여 {d}씩 커질 때 처음 {n}개 항을 더하시오.",
        ),
        "sw": (
            "Mfululizo wa hesabu una neno la kwanza {a1} na tofauti {d}: tafuta jumla ya maneno {n} ya kwanza.",
            "Ukianza na {a1} na kuongeza {d} kila mara, jumla ya namba {n} za kwanza ni ngapi?",
            "Mfululizo unaanza na {a1} na unaongezeka kwa {d}; jumlisha maneno yake {n} ya kwanza.",
        ),
    },
}
# The sentences of the reference script, in English and Chinese. `expag_problems` asks only these.
EXPAG_WORDINGS: dict[str, dict[str, str]] = {
    "plus": {"en": "Calculate {a} + {b}.", "zh": "计算 {a} + {b} 的值。"},
    "times": {"en": "Calculate {a} × {b}.", "zh": "计算 {a} × {b} 的值。"},
    "combinatorics": {"en": "Find the value of C({n}, {k}).", "zh": "求组合数 C({n}, {k}) 的值。"},
    "modular": {
        "en": "What is the remainder when {a} is divided by {b}?",
        "zh": "{a} 除以 {b} 的余数是多少？",
    },
    "geometry": {
        "en": "A rectangle has length {w} and width {h}. Find its area.",
        "zh": "一个长方形的长为 {w}，宽为 {h}，求其面积。",
    },
    "sequences": {
        "en": "An arithmetic sequence: first term {a1}, common difference {d}. Sum of first {n} terms?",
        "zh": "等差数列首项为 {a1}，公差为 {d}，求前 {n} 项之和。",
    },
}
