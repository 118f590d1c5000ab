"""Eight plain sentences in seven languages, without any maths.

Sentence i has the same meaning in every language. If an edit changes a model's predictions here, that is general
damage or the loss of a language, and not the removal of maths. The sentences were written for this project.
"""

SENTENCES: dict[str, tuple[str, ...]] = {
    "en": (
        "The library opens at nine in the morning and closes at six in the evening.",
        "Water boils at a lower temperature on high mountains.",
        "My grandmother keeps bees behind the house and sells the honey at the market.",
        "The train was late because there was heavy snow on the tracks.",
        "Please leave your shoes by the door before you come in.",
        "Many birds fly south when the days grow short.",
        "The museum shows old maps of the city and its harbour.",
        "She learned to play the violin when she was a child.",
    ),
    "zh": (
        "图书馆早上九点开门，晚上六点关门。",
        "在高山上，水的沸点比较低。",
        "我奶奶在房子后面养蜜蜂，在市场上卖蜂蜜。",
        "火车晚点了，因为铁轨上积了厚厚的雪。",
        "进来之前，请把鞋子放在门口。",
        "白天变短的时候，许多鸟飞往南方。",
        "博物馆展出这座城市和港口的旧地图。",
        "她小时候学会了拉小提琴。",
    ),
    "es": (
        "La biblioteca abre a las nueve de la mañana y cierra a las seis de la tarde.",
        "En las montañas altas el agua hierve a menor temperatura.",
        "Mi abuela cría abejas detrás de la casa y vende la miel en el mercado.",
        "El tren llegó tarde porque había mucha nieve en las vías.",
        "Por favor, deje los zapatos junto a la puerta antes de entrar.",
        "Muchas aves vuelan hacia el sur cuando los días se acortan.",
        "El museo muestra mapas antiguos de la ciudad y de su puerto.",
        "Ella aprendió a tocar el violín cuando era niña.",
    ),
    "ar": (
        "تفتح المكتبة في التاسعة صباحا وتغلق في السادسة مساء.",
        "يغلي الماء على الجبال العالية عند درجة حرارة أقل.",
        "تربي جدتي النحل خلف البيت وتبيع العسل في السوق.",
        "تأخر القطار بسبب الثلج الكثيف على السكة.",
        "من فضلك اترك حذاءك عند الباب قبل أن تدخل.",
        "تطير طيور كثيرة إلى الجنوب عندما تقصر الأيام.",
        "يعرض المتحف خرائط قديمة للمدينة ومينائها.",
        "تعلمت العزف على الكمان عندما كانت طفلة.",
    ),
    "ja": (
        "図書館は朝の九時に開き、夕方の六時に閉まります。",
        "高い山の上では、水はより低い温度で沸騰します。",
        "祖母は家の裏でミツバチを飼い、市場で蜂蜜を売っています。",
        "線路に雪が深く積もっていたので、列車が遅れました。",
        "入る前に、靴をドアのそばに置いてください。",
        "日が短くなると、多くの鳥が南へ飛んでいきます。",
        "博物館では町とその港の古い地図を展示しています。",
        "彼女は子どものころにバイオリンを習いました。",
    ),
    "ko": (
        "도서관은 아침 아홉 시에 열고 저녁 여섯 시에 닫습니다.",
        "높은 산에서는 물이 더 낮은 온도에서 끓습니다.",
        "할머니는 집 뒤에서 벌을 기르고 시장에서 꿀을 팝니다.",
        "선로에 눈이 많이 쌓여서 기차가 늦었습니다.",
        "들어오기 전에 신발을 문 옆에 벗어 두세요.",
        "낮이 짧아지면 많은 새들이 남쪽으로 날아갑니다.",
        "박물관은 도시와 항구의 옛 지도를 전시합니다.",
        "그녀는 어릴 때 바이올린을 배웠습니다.",
    ),
    "sw": (
        "Maktaba hufunguliwa saa tatu asubuhi na kufungwa saa kumi na mbili jioni.",
        "Maji huchemka kwa joto la chini zaidi kwenye milima mirefu.",
        "Bibi yangu hufuga nyuki nyuma ya nyumba na kuuza asali sokoni.",
        "Treni ilichelewa kwa sababu kulikuwa na theluji nyingi kwenye reli.",
        "Tafadhali acha viatu vyako karibu na mlango kabla ya kuingia.",
        "Ndege wengi huruka kwenda kusini siku zinapokuwa fupi.",
        "Jumba la makumbusho linaonyesha ramani za zamani za mji na bandari yake.",
        "Alijifunza kupiga fidla alipokuwa mtoto.",
    ),
}
