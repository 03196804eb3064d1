// A parser of JSON (RFC 8259), and text as a JSON string.

#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { LEVELS_MAX = 64 };

typedef struct parser {
    const char *at;
    const char *end;
} parser;

static bool parse_value(parser *parser, int level, oncely_json_value *value);

static void skip_space(parser *parser) {
    while (parser->at < parser->end && strchr(" \t\r\n", *parser->at) != NULL &&
           *parser->at != '\0') {
        parser->at++;
    }
}

static bool next_is(const parser *parser, char c) {
    return parser->at < parser->end && *parser->at == c;
}

static bool accept(parser *parser, char c) {
    if (!next_is(parser, c)) {
        return false;
    }
    parser->at++;
    return true;
}

static bool accept_word(parser *parser, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(parser->end - parser->at) < length || memcmp(parser->at, word, length) != 0) {
        return false;
    }
    parser->at += length;
    return true;
}

static bool accept_digits(parser *parser) {
    const char *start = parser->at;
    while (parser->at < parser->end && *parser->at >= '0' && *parser->at <= '9') {
        parser->at++;
    }
    return parser->at > start;
}

static bool parse_number(parser *parser, oncely_json_value *value) {
    const char *start = parser->at;
    accept(parser, '-');
    if (!accept(parser, '0') && !accept_digits(parser)) {
        return false;
    }
    if (accept(parser, '.') && !accept_digits(parser)) {
        return false;
    }
    if (accept(parser, 'e') || accept(parser, 'E')) {
        if (!accept(parser, '+')) {
            accept(parser, '-');
        }
        if (!accept_digits(parser)) {
            return false;
        }
    }
    value->kind = ONCELY_JSON_NUMBER;
    value->text = oncely_copy(start, (size_t)(parser->at - start));
    return true;
}

static bool parse_hex(parser *parser, uint32_t *unit) {
    if (parser->end - parser->at < 4) {
        return false;
    }
    *unit = 0;
    for (int i = 0; i < 4; i++) {
        char c = *parser->at++;
        uint32_t digit;
        if (c >= '0' && c <= '9') {
            digit = (uint32_t)(c - '0');
        } else if (c >= 'a' && c <= 'f') {
            digit = (uint32_t)(c - 'a') + 10;
        } else if (c >= 'A' && c <= 'F') {
            digit = (uint32_t)(c - 'A') + 10;
        } else {
            return false;
        }
        *unit = *unit * 16 + digit;
    }
    return true;
}

// Writes a code point as UTF-8 and returns the end.
static char *write_utf8(char *out, uint32_t point) {
    if (point < 0x80) {
        *out++ = (char)point;
    } else if (point < 0x800) {
        *out++ = (char)(0xc0 | point >> 6);
        *out++ = (char)(0x80 | (point & 0x3f));
    } else if (point < 0x10000) {
        *out++ = (char)(0xe0 | point >> 12);
        *out++ = (char)(0x80 | (point >> 6 & 0x3f));
        *out++ = (char)(0x80 | (point & 0x3f));
    } else {
        *out++ = (char)(0xf0 | point >> 18);
        *out++ = (char)(0x80 | (point >> 12 & 0x3f));
        *out++ = (char)(0x80 | (point >> 6 & 0x3f));
        *out++ = (char)(0x80 | (point & 0x3f));
    }
    return out;
}

// Parses the part of an escape after the backslash and returns the end of its text, or NULL.
static char *parse_escape(parser *parser, char *out) {
    static const char NAMES[] = "\"\\/bfnrt";
    static const char MEANT[] = "\"\\/\b\f\n\r\t";
    if (parser->at == parser->end) {
        return NULL;
    }
    char c = *parser->at++;
    if (c != 'u') {
        const char *name = c == '\0' ? NULL : strchr(NAMES, c);
        if (name == NULL) {
            return NULL;
        }
        *out = MEANT[name - NAMES];
        return out + 1;
    }
    uint32_t unit;
    if (!parse_hex(parser, &unit)) {
        return NULL;
    }
    if (unit >= 0xd800 && unit < 0xdc00) {
        uint32_t second;
        if (!accept(parser, '\\') || !accept(parser, 'u') || !parse_hex(parser, &second) ||
            second < 0xdc00 || second >= 0xe000) {
            return NULL;
        }
        unit = 0x10000 + ((unit - 0xd800) << 10) + (second - 0xdc00);
    } else if (unit >= 0xdc00 && unit < 0xe000) {
        return NULL;
    }
    return write_utf8(out, unit);
}

static bool parse_string(parser *parser, oncely_bytes *text) {
    if (!accept(parser, '"')) {
        return false;
    }
    // The contents are never longer than their escaped form.
    const char *closing = parser->at;
    while (closing < parser->end && *closing != '"') {
        closing += *closing == '\\' && closing + 1 < parser->end ? 2 : 1;
    }
    char *start = oncely_alloc((size_t)(closing - parser->at) + 1);
    char *out = start;
    while (parser->at < parser->end && *parser->at != '"') {
        unsigned char c = (unsigned char)*parser->at++;
        if (c < 0x20) {
            return false;
        }
        if (c != '\\') {
            *out++ = (char)c;
            continue;
        }
        out = parse_escape(parser, out);
        if (out == NULL) {
            return false;
        }
    }
    *out = '\0';
    *text = (oncely_bytes){start, (size_t)(out - start)};
    return accept(parser, '"');
}

// Parses the values of an array or object after its opening bracket.
static bool parse_items(parser *parser, int level, oncely_json_value *value) {
    bool is_object = value->kind == ONCELY_JSON_OBJECT;
    char closing = is_object ? '}' : ']';
    const oncely_json_value **end = &value->first;
    skip_space(parser);
    if (accept(parser, closing)) {
        return true;
    }
    do {
        oncely_json_value *item = oncely_alloc(sizeof *item);
        *item = (oncely_json_value){.text = {"", 0}, .name = {"", 0}};
        skip_space(parser);
        if (is_object) {
            if (!parse_string(parser, &item->name)) {
                return false;
            }
            skip_space(parser);
            if (!accept(parser, ':')) {
                return false;
            }
        }
        if (!parse_value(parser, level + 1, item)) {
            return false;
        }
        *end = item;
        end = &item->next;
        value->count++;
        skip_space(parser);
    } while (accept(parser, ','));
    return accept(parser, closing);
}

static bool parse_value(parser *parser, int level, oncely_json_value *value) {
    if (level > LEVELS_MAX) {
        return false;
    }
    skip_space(parser);
    if (next_is(parser, '"')) {
        value->kind = ONCELY_JSON_STRING;
        return parse_string(parser, &value->text);
    }
    if (accept(parser, '{')) {
        value->kind = ONCELY_JSON_OBJECT;
        return parse_items(parser, level, value);
    }
    if (accept(parser, '[')) {
        value->kind = ONCELY_JSON_ARRAY;
        return parse_items(parser, level, value);
    }
    if (accept_word(parser, "null")) {
        value->kind = ONCELY_JSON_NULL;
        return true;
    }
    if (accept_word(parser, "true")) {
        value->kind = ONCELY_JSON_BOOLEAN;
        value->boolean = true;
        return true;
    }
    if (accept_word(parser, "false")) {
        value->kind = ONCELY_JSON_BOOLEAN;
        return true;
    }
    return parse_number(parser, value);
}

// Whether bytes are UTF-8 without overlong forms and surrogates.
static bool is_utf8(oncely_bytes text) {
    const unsigned char *at = (const unsigned char *)text.data;
    const unsigned char *end = at + text.length;
    while (at < end) {
        unsigned char first = *at++;
        if (first < 0x80) {
            continue;
        }
        int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
        if (first < 0xc2 || first > 0xf4 || end - at < more) {
            return false;
        }
        if ((first == 0xe0 && at[0] < 0xa0) || (first == 0xed && at[0] > 0x9f) ||
            (first == 0xf0 && at[0] < 0x90) || (first == 0xf4 && at[0] > 0x8f)) {
            return false;
        }
        while (more-- > 0) {
            if ((*at++ & 0xc0) != 0x80) {
                return false;
            }
        }
    }
    return true;
}

const oncely_json_value *oncely_json_parse(oncely_bytes text) {
    if (text.length == 0 || !is_utf8(text)) {
        return NULL;
    }
    parser parser = {text.data, text.data + text.length};
    oncely_json_value *value = oncely_alloc(sizeof *value);
    *value = (oncely_json_value){.text = {"", 0}, .name = {"", 0}};
    if (!parse_value(&parser, 0, value)) {
        return NULL;
    }
    skip_space(&parser);
    return parser.at == parser.end ? value : NULL;
}

const oncely_json_value *oncely_json_get(const oncely_json_value *object, const char *name) {
    if (object == NULL || object->kind != ONCELY_JSON_OBJECT) {
        return NULL;
    }
    const oncely_json_value *found = NULL;
    for (const oncely_json_value *item = object->first; item != NULL; item = item->next) {
        if (oncely_equals(item->name, name)) {
            found = item;
        }
    }
    return found;
}

bool oncely_json_bool(const oncely_json_value *value, bool *result) {
    if (value == NULL || value->kind != ONCELY_JSON_BOOLEAN) {
        return false;
    }
    *result = value->boolean;
    return true;
}

bool oncely_json_int(const oncely_json_value *value, int64_t *result) {
    if (value == NULL || value->kind != ONCELY_JSON_NUMBER) {
        return false;
    }
    char *end;
    errno = 0;
    long long number = strtoll(value->text.data, &end, 10);
    if (errno != 0 || *end != '\0') {
        return false;
    }
    *result = number;
    return true;
}

bool oncely_json_float(const oncely_json_value *value, double *result) {
    if (value == NULL || value->kind != ONCELY_JSON_NUMBER) {
        return false;
    }
    *result = strtod(value->text.data, NULL);
    return true;
}

bool oncely_json_string(const oncely_json_value *value, oncely_bytes *result) {
    if (value == NULL || value->kind != ONCELY_JSON_STRING) {
        return false;
    }
    *result = value->text;
    return true;
}

const char *oncely_json_quote(oncely_bytes text) {
    static const char DIGITS[] = "0123456789abcdef";
    static const char SHORT[] = "btn?fr";
    if (text.length > SIZE_MAX / 6 - 1) {
        oncely_panic("a text of %zu bytes is too long", text.length);
    }
    // An escaped character has at most six bytes.
    char *start = oncely_alloc(text.length * 6 + 3);
    char *out = start;
    *out++ = '"';
    for (size_t i = 0; i < text.length; i++) {
        unsigned char c = (unsigned char)text.data[i];
        if (c == '"' || c == '\\') {
            *out++ = '\\';
            *out++ = (char)c;
        } else if (c >= 0x20) {
            *out++ = (char)c;
        } else if (c >= '\b' && c <= '\r' && c != '\v') {
            *out++ = '\\';
            *out++ = SHORT[c - '\b'];
        } else {
            memcpy(out, "\\u00", 4);
            out[4] = DIGITS[c >> 4];
            out[5] = DIGITS[c & 15];
            out += 6;
        }
    }
    *out++ = '"';
    *out = '\0';
    return start;
}
