"""The texts that the tokenizer's goldens are made of: many scripts, emoji, code,
white space, digits, and the corners of o200k's splitting rule."""

TEXTS = [
    "", " ", "  ", "a", "Hello, world!", "France capital? Answer:", " Paris", "Paris",
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX. tHe qUiCk bRoWn fOx.",
    "don't can't we'll they're I'd I've she's DON'T CAN'T WE'LL I'M 'tis ''quoted''",
    "it\u2019s the curly apostrophe; it's the straight one; x\u017f'\u017fx",
    # scripts
    "Grüße aus Köln, voilà une phrase française, ¿qué tal? ¡Olé! Łódź, Čeština, İstanbul ıI",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ЁЛКА",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία", "עברית: שלום עולם, נִקּוּד", "العربية: مرحبا بالعالم، ١٢٣٤٥٦",
    "हिन्दी: नमस्ते दुनिया, १२३४५", "বাংলা ভাষা, தமிழ் மொழி, తెలుగు, ಕನ್ನಡ, മലയാളം, ગુજરાતી, ਪੰਜਾਬੀ",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ", "ພາສາລາວ, ភាសាខ្មែរ, မြန်မာဘာသာ, བོད་སྐད་",
    "中文：你好，世界！繁體字與简体字。", "日本語のテキスト、カタカナとひらがなと漢字。ｶﾅ", "한국어 텍스트입니다. ㄱㄴㄷ",
    "ქართული ენა, Հայերեն, አማርኛ, ᏣᎳᎩ, ᠮᠣᠩᠭᠣᠯ, ꦧꦱꦗꦮ, 𐌰𐌱𐌲, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    # emoji and marks
    "😀😃😄 👩‍👩‍👧‍👦 👍🏽 🇫🇷🇩🇪 ❤️ 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ☕️✈︎ 🫠",
    "e\u0301 vs é, n\u0303, a\u030a\u0323, Z\u0351\u036b\u0343\u036aalgo, \u0301leading mark", "zero\u200bwidth\u200djoiner\ufeffbom\u00adsoft",
    # white space
    "a b  c   d    e     f", "tab\tseparated\t\tvalues\t", "line\nbreak\r\nwindows\rold mac\n\n\nthree",
    "trailing spaces   \n  leading", "   \n   \n   ", "\n\n", "\r\n\r\n", " \t \n \t ", "\u00a0nbsp\u00a0\u00a0two\u2003em\u3000ideographic\u2028ls\u2029ps\u0085nel",
    "\x0bvt\x0cff\x1cfs\x1fus\x00nul\x7fdel", "end with space ", "\ta", " \na", "a \n b",
    # digits
    "1", "12", "123", "1234", "12345678901234567890", "3.14159265358979", "1,234,567.89", "0x1F600 1e-5 −273.15 ½ ² ³ Ⅷ ①",
    "2024-06-28T12:34:56Z", "9" * 100, "٠١٢٣٤٥٦٧٨٩", "a1b22c333d4444", "+49 (0)30 1234567", "192.168.0.1:8080",
    # code
    "def f(x):\n    return x ** 2  # square\n\n\nclass A(B):\n\tpass\n",
    "func main() {\n\tfmt.Println(\"Hello, 世界\")\n}\n", "for (int i = 0; i < n; ++i) { a[i] += b[i] * c; }",
    "SELECT * FROM t WHERE name LIKE '%x%' AND id >= 10;", "<div class=\"a\">&nbsp;</div><!-- c -->",
    "{\"text\": \"Paris\"}", "{\"a\":[1,2,{\"b\":null}]}", "snake_case camelCase PascalCase SCREAMING_CASE kebab-case HTTPServer",
    "path/to/file.txt C:\\Users\\me //comment ///doc /* x */ #!/bin/sh\n", "a=b==c===d!=e<=f>=g<<h>>i&&j||k??l?.m",
    "!!! ??? ... --- ___ *** === /// \\\\\\ ~~~ $$$ %%% ^^^ &&& @@@ ###", "$$\\frac{a}{b} = \\sum_{i=0}^{n} x_i$$",
    "https://example.com/a?b=c&d=%20#frag me@example.com", "\x1b[31mred\x1b[0m", "....\n", "/\n/\n", ")\n}\n", "!\r\n/x",
    # long pieces
    "a" * 300, "ab" * 200, " " * 257, "\n" * 100, "=" * 129, "é" * 150, "漢" * 130, "Aa" * 99, "😀" * 60,
    "supercalifragilisticexpialidocious antidisestablishmentarianism Donaudampfschifffahrtsgesellschaftskapitän",
    # look like special tokens, are text
    "<|endoftext|>", "<|start|>user<|message|>hi<|end|>", "<|return|", "|>", "<|not_a_token|>", "<|reserved_200013|>", "< |end| >",
    "\U0010ffff\U000e0001\ue000", "\ufffd\ufffe", "ǅ ǆ Ǆ ᾈ ﬁ ß ẞ Σς",
]

# With special tokens recognized.
SPECIAL = [
    "<|start|>user<|message|>France capital?<|end|><|start|>assistant",
    "<|startoftext|>a<|endoftext|>", "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>y<|return|>",
    " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>", "<|end|><|end|>", "a <|end|> b\n<|return|>\n",
    "<|reserved_200000|><|reserved_200013|><|reserved_201087|>",
]
