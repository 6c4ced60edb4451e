"""The tables of the embedded world: what is true, and the words in which it is asked.

Every table is a string of ``key=answer`` pairs; an answer shared by several keys is fine, a key has one answer.
Keys and answers are short on purpose: one option of a multiple-choice question is about one token.
Written for this project; some entries (the valley towns) are invented, the others are common knowledge.
"""

from __future__ import annotations

WORLD_VERSION = "1"


def pairs(table: str) -> tuple[tuple[str, str], ...]:
    """``"a=b c=d"`` -> ``(("a", "b"), ("c", "d"))``; an underscore stands for a space."""
    return tuple((k.replace("_", " "), v.replace("_", " ")) for k, v in (p.split("=") for p in table.split()))


CAPITALS = pairs(
    "France=Paris Italy=Rome Spain=Madrid Germany=Berlin Japan=Tokyo China=Beijing Russia=Moscow Egypt=Cairo "
    "Greece=Athens Austria=Vienna Poland=Warsaw Norway=Oslo Sweden=Stockholm Finland=Helsinki Ireland=Dublin "
    "Portugal=Lisbon Hungary=Budapest Cuba=Havana Peru=Lima Kenya=Nairobi Iran=Tehran Turkey=Ankara "
    "Thailand=Bangkok Canada=Ottawa"
)
CAPITALS_ZH = pairs(
    "法国=巴黎 意大利=罗马 西班牙=马德里 德国=柏林 日本=东京 中国=北京 俄罗斯=莫斯科 埃及=开罗 "
    "希腊=雅典 奥地利=维也纳 波兰=华沙 挪威=奥斯陆 瑞典=斯德哥尔摩 芬兰=赫尔辛基 爱尔兰=都柏林 "
    "葡萄牙=里斯本 匈牙利=布达佩斯 古巴=哈瓦那 秘鲁=利马 肯尼亚=内罗毕 伊朗=德黑兰 土耳其=安卡拉 "
    "泰国=曼谷 加拿大=渥太华"
)
# No symbol is one of the option letters A to D.
ELEMENTS = pairs(
    "hydrogen=H helium=He lithium=Li nitrogen=N oxygen=O fluorine=F neon=Ne sodium=Na magnesium=Mg "
    "aluminium=Al silicon=Si sulfur=S chlorine=Cl argon=Ar potassium=K calcium=Ca iron=Fe copper=Cu "
    "zinc=Zn silver=Ag tin=Sn gold=Au mercury=Hg lead=Pb"
)
ELEMENTS_ZH = pairs(
    "氢=H 氦=He 锂=Li 氮=N 氧=O 氟=F 氖=Ne 钠=Na 镁=Mg 铝=Al 硅=Si 硫=S 氯=Cl 氩=Ar 钾=K 钙=Ca 铁=Fe 铜=Cu "
    "锌=Zn 银=Ag 锡=Sn 金=Au 汞=Hg 铅=Pb"
)
ANIMALS = pairs(
    "dog=mammal cat=mammal horse=mammal whale=mammal lion=mammal eagle=bird duck=bird owl=bird swan=bird hen=bird "
    "shark=fish salmon=fish carp=fish trout=fish bee=insect ant=insect fly=insect beetle=insect snake=reptile "
    "turtle=reptile lizard=reptile crocodile=reptile frog=amphibian toad=amphibian"
)
ANIMALS_ZH = pairs(
    "狗=哺乳类 猫=哺乳类 马=哺乳类 鲸=哺乳类 狮子=哺乳类 鹰=鸟类 鸭=鸟类 猫头鹰=鸟类 天鹅=鸟类 母鸡=鸟类 "
    "鲨鱼=鱼类 三文鱼=鱼类 鲤鱼=鱼类 鳟鱼=鱼类 蜜蜂=昆虫 蚂蚁=昆虫 苍蝇=昆虫 甲虫=昆虫 蛇=爬行类 "
    "乌龟=爬行类 蜥蜴=爬行类 鳄鱼=爬行类 青蛙=两栖类 蟾蜍=两栖类"
)
OPPOSITES = pairs(
    "hot=cold big=small fast=slow good=bad old=young rich=poor light=dark high=low long=short full=empty wet=dry "
    "loud=quiet hard=soft open=closed early=late strong=weak clean=dirty happy=sad near=far thick=thin"
)
OPPOSITES_ZH = pairs(
    "热=冷 大=小 快=慢 好=坏 新=旧 富=穷 明=暗 高=低 长=短 满=空 湿=干 吵=静 硬=软 开=关 早=晚 强=弱 干净=肮脏 "
    "高兴=难过 近=远 厚=薄"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
MONTHS_ZH = (
    "一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月", "十一月", "十二月",
)  # fmt: skip
JOBS = pairs(
    "school=teacher hospital=doctor farm=farmer kitchen=cook court=judge ship=sailor bakery=baker library=librarian "
    "garden=gardener bank=banker laboratory=scientist theatre=actor mine=miner forest=forester church=priest "
    "army=soldier newspaper=journalist studio=painter cockpit=pilot pharmacy=chemist"
)
JOBS_ZH = pairs(
    "学校=教师 医院=医生 农场=农民 厨房=厨师 法院=法官 轮船=水手 面包店=面包师 图书馆=馆员 "
    "花园=园丁 银行=银行家 实验室=科学家 剧院=演员 矿山=矿工 森林=护林员 教堂=牧师 "
    "军队=士兵 报社=记者 画室=画家 驾驶舱=飞行员 药店=药剂师"
)
COLOURS = pairs(
    "snow=white milk=white salt=white coal=black tar=black grass=green leaves=green peas=green blood=red "
    "tomatoes=red rubies=red sky=blue sapphires=blue lemons=yellow butter=yellow chocolate=brown coffee=brown "
    "elephants=grey ash=grey flamingos=pink carrots=orange plums=purple"
)
COLOURS_ZH = pairs(
    "雪=白色 牛奶=白色 盐=白色 煤=黑色 焦油=黑色 草=绿色 树叶=绿色 豌豆=绿色 血=红色 番茄=红色 "
    "红宝石=红色 天空=蓝色 蓝宝石=蓝色 柠檬=黄色 黄油=黄色 巧克力=棕色 咖啡=棕色 大象=灰色 灰烬=灰色 "
    "火烈鸟=粉色 胡萝卜=橙色 李子=紫色"
)
UNITS = pairs(
    "length=metre mass=kilogram time=second force=newton energy=joule power=watt pressure=pascal frequency=hertz "
    "voltage=volt current=ampere resistance=ohm charge=coulomb capacitance=farad temperature=kelvin volume=litre "
    "angle=radian"
)
UNITS_ZH = pairs(
    "长度=米 质量=千克 时间=秒 力=牛顿 能量=焦耳 功率=瓦特 压强=帕斯卡 频率=赫兹 电压=伏特 电流=安培 电阻=欧姆 "
    "电荷=库仑 电容=法拉 温度=开尔文 体积=升 角度=弧度"
)
FOODS = pairs(
    "apple=fruit pear=fruit banana=fruit grape=fruit cherry=fruit cabbage=vegetable onion=vegetable spinach=vegetable "
    "leek=vegetable rice=grain wheat=grain oats=grain barley=grain beef=meat pork=meat ham=meat lamb=meat "
    "cheese=dairy yogurt=dairy cream=dairy tea=drink juice=drink wine=drink"
)
FOODS_ZH = pairs(
    "苹果=水果 梨=水果 香蕉=水果 葡萄=水果 樱桃=水果 白菜=蔬菜 洋葱=蔬菜 菠菜=蔬菜 韭葱=蔬菜 大米=谷物 小麦=谷物 "
    "燕麦=谷物 大麦=谷物 牛肉=肉类 猪肉=肉类 火腿=肉类 羊肉=肉类 奶酪=乳品 酸奶=乳品 奶油=乳品 茶=饮料 果汁=饮料 "
    "葡萄酒=饮料"
)
MEASURE_WORDS_ZH = pairs(
    "牛=头 马匹=匹 书=本 纸=张 树=棵 花=朵 鱼=条 船=艘 汽车=辆 飞机=架 衣服=件 帽子=顶 椅子=把 电影=部 灯=盏 "
    "房子=座 笔=支 伞=把 信=封 歌=首"
)
# Invented: twenty towns of a valley, the river each lies on and what each makes. World(seed) deals the answers.
TOWNS = (
    "Tarn", "Velm", "Osk", "Brel", "Dunmar", "Kolva", "Pirth", "Sorn", "Ulwick", "Fenra",
    "Galt", "Hesk", "Ivar", "Jorl", "Lund", "Morva", "Nesk", "Quill", "Rusk", "Yarl",
)  # fmt: skip
RIVERS = ("Amber", "Birch", "Cedar", "Drift", "Ember", "Frost", "Glen", "Hazel")
WARES = ("wool", "glass", "bricks", "paper", "silk", "honey", "clocks", "rope")
