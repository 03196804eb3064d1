//! Accepts orders: stores each one, and sends a message about it.

use oncely_guest::prelude::*;

/// The body of a message on `{{name}}.new`.
#[derive(Deserialize)]
struct Order {
    id: String,
    cents: i64,
}

/// The body of a message on `{{name}}.accepted`.
#[derive(Serialize)]
struct Accepted<'o> {
    id: &'o str,
}

oncely_guest::handler!(handle);

/// The effects of this function are committed together, once, when it returns `Ok`.
fn handle(message: Message) -> Result<(), Failure> {
    let order: Order = message.json()?;
    check(&order)?;
    let stored = sql::execute(
        "insert into orders (id, cents) values ($1, $2) on conflict do nothing",
        params![order.id, order.cents],
    )?;
    if stored == 0 {
        log::info!("order {} came in another message before", order.id);
        return Ok(());
    }
    outbox::send(Outgoing::json("{{name}}.accepted", &Accepted { id: &order.id })?)?;
    log::info!("accepted order {}", order.id);
    Ok(())
}

fn check(order: &Order) -> Result<(), Failure> {
    if order.cents <= 0 {
        return Err(Failure::reject("an order needs a positive amount").code("malformed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(cents: i64) -> Order {
        Order {
            id: "o1".to_owned(),
            cents,
        }
    }

    #[test]
    fn an_order_without_an_amount_is_rejected() {
        assert!(check(&order(500)).is_ok());
        assert_eq!(check(&order(0)).unwrap_err().code.as_deref(), Some("malformed"));
    }
}
