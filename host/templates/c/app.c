// Accepts orders: stores each one, and sends a message about it.

#include "oncely/oncely.h"

// The effects of this function are committed together, once, when it returns `oncely_ok()`.
oncely_result oncely_handle(const oncely_message *message) {
    oncely_bytes id;
    int64_t cents;
    const oncely_json_value *order = oncely_json_parse(message->body);
    if (!oncely_json_string(oncely_json_get(order, "id"), &id) ||
        !oncely_json_int(oncely_json_get(order, "cents"), &cents)) {
        return oncely_reject("malformed", "an order has an id, and an amount in cents");
    }
    if (cents <= 0) {
        return oncely_reject("malformed", "an order needs a positive amount");
    }

    uint64_t stored;
    ONCELY_TRY(oncely_sql_execute(
        "insert into orders (id, cents) values ($1, $2) on conflict do nothing",
        ONCELY_PARAMS(oncely_text(id.data), oncely_int(cents)), &stored));
    if (stored == 0) {
        oncely_log(ONCELY_INFO, "order %s came in another message before", id.data);
        return oncely_ok();
    }
    oncely_bytes body = oncely_format("{\"id\":%s}", oncely_json_quote(id));
    ONCELY_TRY(oncely_send("{{name}}.accepted", body, NULL));
    oncely_log(ONCELY_INFO, "accepted order %s", id.data);
    return oncely_ok();
}
