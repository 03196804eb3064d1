// A worker in C that sends greetings and counts them by name.

#include "oncely/oncely.h"

oncely_result oncely_handle(const oncely_message *message) {
    oncely_bytes name, stored;
    if (!oncely_json_string(oncely_json_get(oncely_json_parse(message->body), "name"), &name)) {
        return oncely_reject("malformed", "a request has a name");
    }

    const char *key = oncely_format("greeted.%s", name.data).data;
    bool exists;
    int64_t times = 0;
    ONCELY_TRY(oncely_state_get(key, &exists, &stored, NULL));
    if (exists) {
        oncely_json_int(oncely_json_parse(stored), &times);
    }
    times++;
    ONCELY_TRY(oncely_state_set(key, oncely_format("%lld", (long long)times), NULL));

    oncely_bytes greeting = oncely_format("Hello %s", name.data);
    oncely_bytes body = oncely_format("{\"greeting\": %s, \"times\": %lld}",
                                      oncely_json_quote(greeting), (long long)times);
    ONCELY_TRY(oncely_send("greetings.sent", body, NULL));
    return oncely_ok();
}
