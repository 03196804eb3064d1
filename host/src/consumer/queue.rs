//! The queue of a lane: in stream order within each key. Messages wait while their key is held by a
//! failed one.

use std::collections::{HashMap, VecDeque};

use tokio::time::Instant;

/// An item with a place in the order of its key.
pub trait Sequenced {
    /// Items with the same key are handled in order. `None` for items without an order.
    fn key(&self) -> Option<&str>;
    /// The position in that order.
    fn sequence(&self) -> u64;
}

/// The queue of one lane.
pub struct Queue<T> {
    /// Items that can run now, unless their key is held.
    ready: VecDeque<T>,
    /// By key: the failed item and the later ones, until the key is due.
    held: HashMap<String, HeldKey<T>>,
    /// The highest sequence so far.
    highest_sequence: u64,
}

struct HeldKey<T> {
    due: Instant,
    items: Vec<T>,
}

impl<T: Sequenced> Queue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        Queue {
            ready: VecDeque::new(),
            held: HashMap::new(),
            highest_sequence: 0,
        }
    }

    /// Adds an item before later ones of its key. A redelivered message may arrive late.
    pub fn push(&mut self, item: T) {
        let is_late = item.sequence() < self.highest_sequence;
        self.highest_sequence = self.highest_sequence.max(item.sequence());
        let overtaken = |other: &T| other.key() == item.key() && other.sequence() > item.sequence();
        match self
            .ready
            .iter()
            .position(overtaken)
            .filter(|_| is_late && item.key().is_some())
        {
            Some(place) => self.ready.insert(place, item),
            None => self.ready.push_back(item),
        }
    }

    /// Returns items that were taken and did not run to the front, in their order.
    pub fn requeue(&mut self, items: Vec<T>) {
        for item in items.into_iter().rev() {
            self.ready.push_front(item);
        }
    }

    /// Holds the key of a failed item until `due`. No item of that key is taken earlier.
    pub fn hold(&mut self, item: T, due: Instant) {
        let Some(key) = item.key().map(str::to_owned) else {
            return self.push(item);
        };
        let held = self.held.entry(key).or_insert_with(|| HeldKey {
            due,
            items: Vec::new(),
        });
        held.due = held.due.max(due);
        held.items.push(item);
    }

    /// Takes at most `max` items that can run now, in order.
    pub fn take(&mut self, max: usize, now: Instant) -> Vec<T> {
        self.release(now);
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(item) = self.ready.pop_front()
        {
            match item.key().and_then(|key| self.held.get_mut(key)) {
                Some(held) => held.items.push(item),
                None => taken.push(item),
            }
        }
        taken
    }

    /// The time at which the next held key is due. `None` when no key is held.
    pub fn next_due(&self) -> Option<Instant> {
        self.held.values().map(|held| held.due).min()
    }

    /// Releases the keys that are due. Their items come first, because all others of the same key
    /// are later.
    fn release(&mut self, now: Instant) {
        for (_, mut held) in self.held.extract_if(|_, held| held.due <= now) {
            held.items.sort_by_key(Sequenced::sequence);
            for item in held.items.into_iter().rev() {
                self.ready.push_front(item);
            }
        }
    }

    /// All remaining items, in stream order.
    pub fn into_remaining(self) -> Vec<T> {
        let held = self.held.into_values().flat_map(|held| held.items);
        let mut rest: Vec<T> = self.ready.into_iter().chain(held).collect();
        rest.sort_by_key(Sequenced::sequence);
        rest
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[derive(Debug, PartialEq, Clone, Copy)]
    struct Item(&'static str, u64);

    impl Sequenced for Item {
        fn key(&self) -> Option<&str> {
            Some(self.0).filter(|key| !key.is_empty())
        }

        fn sequence(&self) -> u64 {
            self.1
        }
    }

    fn queue(items: &[Item]) -> Queue<Item> {
        let mut queue = Queue::new();
        items.iter().for_each(|item| queue.push(*item));
        queue
    }

    #[test]
    fn a_held_key_waits_in_order_and_others_continue() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut queue = queue(&[
            Item("a", 1),
            Item("b", 2),
            Item("a", 3),
            Item("", 4),
            Item("a", 5),
        ]);
        assert_eq!(
            queue.take(3, now),
            [Item("a", 1), Item("b", 2), Item("a", 3)]
        );
        // 1 failed, and 3 waits for it.
        queue.hold(Item("a", 1), later);
        queue.requeue(vec![Item("a", 3)]);
        queue.push(Item("b", 6));
        assert_eq!(queue.take(9, now), [Item("", 4), Item("b", 6)]);
        queue.push(Item("a", 7));
        assert_eq!(queue.take(9, now), []);
        assert_eq!(queue.next_due(), Some(later));
        queue.push(Item("b", 8));
        assert_eq!(
            queue.take(9, later),
            [
                Item("a", 1),
                Item("a", 3),
                Item("a", 5),
                Item("a", 7),
                Item("b", 8)
            ]
        );
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn late_items_are_inserted_in_the_order_of_their_key() {
        let now = Instant::now();
        let mut queue = queue(&[
            Item("a", 5),
            Item("b", 2),
            Item("a", 7),
            Item("a", 6),
            Item("", 1),
        ]);
        assert_eq!(
            queue.take(9, now),
            [
                Item("a", 5),
                Item("b", 2),
                Item("a", 6),
                Item("a", 7),
                Item("", 1)
            ]
        );
        queue.push(Item("a", 9));
        queue.push(Item("a", 8));
        queue.hold(Item("a", 7), now + Duration::from_secs(1));
        assert_eq!(queue.take(9, now), []);
        queue.push(Item("a", 4));
        assert_eq!(queue.take(9, now), []);
        assert_eq!(
            queue.into_remaining(),
            [Item("a", 4), Item("a", 7), Item("a", 8), Item("a", 9)]
        );
    }
}
