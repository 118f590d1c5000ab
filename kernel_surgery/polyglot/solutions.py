"""The worked solutions polyglot is trained to write: a sentence, the working, and the answer, in the language asked.

The working is the same in every language and never needs more than one small step per number written:

    addition         238+152: 8+2+0=10 3+5+1=9 2+1+0=3                          columns from the right, with carries
    multiplication   17×18: 0+7×8→56 5+1×8→13+7×1→20 2+1×1→3                    columns; each arrow is a running total
    remainder        135÷31: 135-31×4=135-124: 5-4-0=1 3-2-0=1 1-1-0=0          long division, column by column
    series           (25-1)×6=144 9×2=18 144+18: ... 162÷2=81 81×25: ...        sum of both ends, times half of n
    C(n, k)          C(7, 6)=C(7, 1)=7                                          symmetry, then recalled from a table

The operands are written out again before the columns, so that what is asked (language, order, category) and how digits
are combined can be learned apart.
"""

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.problems.generator import Parameters, Problem

SENTENCES: dict[str, dict[str, str]] = {
    "plus": {
        "zh": "我们从右边开始逐位相加。",
        "en": "We add column by column from the right.",
        "es": "Sumamos columna por columna desde la derecha.",
        "ar": "نجمع خانة بعد خانة ابتداء من اليمين.",
        "ja": "右の位から順番に足していきます。",
        "ko": "오른쪽 자리부터 차례대로 더합니다.",
        "sw": "Tunajumlisha safu moja baada ya nyingine kutoka kulia.",
    },
    "times": {
        "zh": "我们从右边开始逐位相乘。",
        "en": "We multiply column by column from the right.",
        "es": "Multiplicamos columna por columna desde la derecha.",
        "ar": "نضرب خانة بعد خانة ابتداء من اليمين.",
        "ja": "右の位から順番に掛けていきます。",
        "ko": "오른쪽 자리부터 차례대로 곱합니다.",
        "sw": "Tunazidisha safu moja baada ya nyingine kutoka kulia.",
    },
    "combinatorics": {
        "zh": "选出一部分就等于留下其余的部分。",
        "en": "Choosing some of them is the same as leaving out the rest.",
        "es": "Elegir algunos es lo mismo que dejar fuera los demás.",
        "ar": "اختيار بعض الأشياء هو نفسه ترك الأشياء الباقية.",
        "ja": "いくつかを選ぶことは残りを外すことと同じです。",
        "ko": "몇 개를 고르는 것은 나머지를 빼는 것과 같습니다.",
        "sw": "Kuchagua baadhi yake ni sawa na kuacha vingine vyote.",
    },
    "modular": {
        "zh": "我们从左边开始逐位做除法。",
        "en": "We divide digit by digit from the left.",
        "es": "Dividimos cifra por cifra desde la izquierda.",
        "ar": "نقسم رقما بعد رقم ابتداء من اليسار.",
        "ja": "左の桁から順番に割っていきます。",
        "ko": "왼쪽 숫자부터 차례대로 나눕니다.",
        "sw": "Tunagawanya tarakimu moja baada ya nyingine kutoka kushoto.",
    },
    "geometry": {
        "zh": "长方形的面积等于长乘以宽。",
        "en": "The area is the length multiplied by the width.",
        "es": "El área es el largo multiplicado por el ancho.",
        "ar": "المساحة هي حاصل ضرب الطول في العرض.",
        "ja": "面積は縦の長さと横の長さの積です。",
        "ko": "넓이는 가로의 길이와 세로의 길이를 곱한 값입니다.",
        "sw": "Eneo ni urefu uliozidishwa kwa upana wake.",
    },
    "sequences": {
        "zh": "我们先求首项与最后一项的和，再求总和。",
        "en": "We add the first and the last term and then find the sum.",
        "es": "Primero sumamos el primer y el último término y después hallamos la suma.",
        "ar": "نجمع الحد الأول والحد الأخير ثم نحسب المجموع.",
        "ja": "まず最初の項と最後の項の和を求め、それから合計を求めます。",
        "ko": "먼저 첫 항과 마지막 항의 합을 구하고 그 다음에 총합을 구합니다.",
        "sw": "Kwanza tunatafuta jumla ya neno la kwanza na la mwisho kisha jumla yote.",
    },
}
ANSWERS: dict[str, str] = {
    "zh": "所以答案是 {answer}。",
    "en": "So the answer is {answer}.",
    "es": "Por lo tanto la respuesta es {answer}.",
    "ar": "إذن الجواب هو {answer}.",
    "ja": "したがって答えは {answer} です。",
    "ko": "따라서 답은 {answer}입니다.",
    "sw": "Kwa hiyo jibu lake ni {answer}.",
}


def _digits(number: int) -> list[int]:
    """Digits from the right."""
    return [int(c) for c in reversed(str(number))]


def _add(a: int, b: int) -> str:
    x, y = _digits(a), _digits(b)
    width = max(len(x), len(y))
    x, y = x + [0] * (width - len(x)), y + [0] * (width - len(y))
    columns, carry = [], 0
    for i, j in zip(x, y, strict=True):
        total = i + j + carry
        columns.append(f"{i}+{j}+{carry}={total}")
        carry = total // 10
    return f"{a}+{b}: " + " ".join(columns)


def _multiply(a: int, b: int) -> str:
    x, y = _digits(a), _digits(b)
    columns, carry = [], 0
    for column in range(len(x) + len(y) - 1):
        text, total = str(carry), carry
        for i in range(len(x) - 1, -1, -1):
            if 0 <= column - i < len(y):
                total += x[i] * y[column - i]
                text += f"+{x[i]}×{y[column - i]}→{total}"
        columns.append(text)
        carry = total // 10
    return f"{a}×{b}: " + " ".join(columns)


def _subtract(a: int, b: int) -> str:
    """a - b >= 0 in columns from the right: digit (with the ten it borrows) - digit - what the last one borrowed."""
    x, y = _digits(a), _digits(b)
    columns, borrowed = [], 0
    for i, j in zip(x, y + [0] * (len(x) - len(y)), strict=True):
        ten = 10 * (i < j + borrowed)
        columns.append(f"{i + ten}-{j}-{borrowed}={i + ten - j - borrowed}")
        borrowed = ten // 10
    return f"{a}-{b}: " + " ".join(columns)


def _divide(a: int, b: int) -> str:
    steps: list[str] = []
    rest = 0
    for position, digit in enumerate(str(a)):
        rest = 10 * rest + int(digit)
        # The first digits are taken together until they reach the divisor (or the number ends).
        if steps or rest >= b or position == len(str(a)) - 1:
            q = rest // b
            steps.append(f"{rest}-{b}×{q}={_subtract(rest, b * q)}")
            rest -= b * q
    return f"{a}÷{b}: " + " ".join(steps)


def _sum_series(a1: int, d: int, n: int) -> str:
    growth = (n - 1) * d
    ends = 2 * a1 + growth
    text = f"({n}-1)×{d}={growth} {a1}×2={2 * a1} {_add(growth, 2 * a1)} "
    # n or the sum of the two ends is even: halve that one.
    if n % 2 == 0:
        return text + f"{n}÷2={n // 2} " + _multiply(ends, n // 2)
    return text + f"{ends}÷2={ends // 2} " + _multiply(ends // 2, n)


def _choose(n: int, k: int, answer: int) -> str:
    return f"C({n}, {k})={answer}" if 2 * k <= n else f"C({n}, {k})=C({n}, {n - k})={answer}"


def working(kind: str, p: Parameters, answer: int) -> str:
    """The language-free middle line of a solution. Raises ValueError for an unknown kind."""
    match kind:
        case "plus":
            return _add(p["a"], p["b"])
        case "times":
            return _multiply(p["a"], p["b"])
        case "geometry":
            return _multiply(p["w"], p["h"])
        case "modular":
            return _divide(p["a"], p["b"])
        case "sequences":
            return _sum_series(p["a1"], p["d"], p["n"])
        case "combinatorics":
            return _choose(p["n"], p["k"], answer)
    raise KernelSurgeryError(f"unknown kind of problem {kind!r}")


def solution(problem: Problem, language: str) -> str:
    """What polyglot should write after the prompt: a line break, sentence, working, answer; each on its line."""
    return "\n".join(
        (
            "",
            SENTENCES[problem.kind][language],
            working(problem.kind, problem.parameters, int(problem.answer)),
            ANSWERS[language].format(answer=problem.answer),
        )
    )
