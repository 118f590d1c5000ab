"""Which lines of a text are source code. Code is in no language."""

import pytest

from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.scoring.code import MAX_LENGTH, is_code, strip_code
from kernel_surgery.scoring.language import judge
from tests.scoring.test_language import SENTENCES

CODE = """
def area(width, height):
    return width * height
total = price * count
print(total)
print("The answer is", area(3, 4))
for apple in range(number_of_apples):
for key, value in sorted(prices.items()):
    total += apple * price
if total > limit:
elif remainder == 0:
else:
while remainder != 0:
import math
from math import gcd
import numpy as np
with open("numbers.txt") as file:
class Rectangle:
try:
except ValueError:
finally:
assert total == 390
answer = [n for n in numbers if n % 2 == 0]
answer = sum(prices) / len(prices)  # the mean price
>>> print(first + second)
numbers.append(next_number)
return total, count
x, y = 3, 4
int total = price * count;
let total = price * count;
const answer = width * height;
console.log(total);
System.out.println("The answer is " + total);
std::cout(answer);
for (int i = 0; i < count; i++) {
while (remainder > 0) {
} else {
if (total > limit) {
function area(width, height) {
int main() {
public static void main(String[] args) {
return total;
#include <stdio.h>
using namespace std;
}
""".strip().split("\n")

# Prose that looks like code: formulas in words, brackets, colons, semicolons, the words that languages use as keywords.
PROSE = """
The total (in dollars) is 40.
Cost (apples)
Answer: 42
Speed: distance by time
if and only if the number is even:
For all numbers in the list:
for example:
for each of the boxes:
with care:
while we wait, the train moves on.
import duties are added.
from left to right
return to the first step.
try again:
class notes:
print the result
assert that it holds
else we would have too many
We have x = 5 apples;
So the answer is x = 5
Let n = 3 be the number of boxes.
therefore y = 2x + 3 holds
# Solution of the problem
## Second step
- add the tens (4 and 3);
For (i) and (ii) we get the same.
function of two variables
static equilibrium holds;
Let us compute f(x) for all x.
area = base times height
Área = base por altura
La función f(x) crece.
Kwa hiyo jumla = 5 na 3
x is odd
yes, and no
答案是 x = 5。
总价 = 单价 乘以 数量
""".strip().split("\n")


@pytest.mark.parametrize("line", CODE)
def test_code_is_code(line):
    assert is_code(line) and is_code("    " + line)


@pytest.mark.parametrize("line", PROSE)
def test_prose_is_not_code(line):
    assert not is_code(line)


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_not_code(language):
    assert not any(is_code(s) or is_code(s + " 390.") for s in SENTENCES[language])


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("fence", ["", "```", "~~~"])
def test_unfenced_and_fenced_code_leaves_the_verdict(language, fence):
    prose = SENTENCES[language][1:4]
    code = ["# multiply the price by the count", "total = price * count", "print(total)"]
    text = "\n".join([prose[0], *([fence + "python"] if fence else []), *code, *([fence] if fence else []), prose[1]])
    assert judge(text, language) == judge("\n".join(prose[:2]), language)
    assert judge(text, language).passed is True


def test_a_comment_counts_as_code_only_beside_code():
    assert strip_code("# Add the first numbers\nx = first + second") == "\n"
    assert strip_code("x = first + second\n// the sum of both numbers") == "\n"
    heading = "# Add the first numbers\n\n我们先把十位相加。"
    assert strip_code(heading) == heading
    # A second language in a heading is still found.
    assert judge("# Add the first numbers\n我们先把十位相加。", "zh").passed is False


def test_markup_is_code():
    assert judge("答案如下。\n<code>\nadd both numbers and print the sum\n</code>", "zh").passed is True
    assert judge("答案如下。\n<pre class='py'>add both numbers and print the sum</pre>", "zh").passed is True


UNREADABLE = ("(" * 200, "x = " + "(" * 250, "f(\0)", "5in x = 3", "x = '" + "\\" * 50, "f(\ud800)")


@pytest.mark.parametrize("line", UNREADABLE)
def test_what_the_parser_cannot_take_is_prose(line, recwarn):
    assert not is_code(line)
    assert not recwarn.list


def test_a_very_long_line_is_prose():
    assert is_code("x = " + "1 + " * 20 + "1") and not is_code("x = " + "1 + " * MAX_LENGTH + "1")
