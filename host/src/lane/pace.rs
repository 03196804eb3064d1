//! How many messages a lane puts into one transaction.

/// A batch size that follows what batches come to: half as many after one that had to be run again because of some of its
/// members, one more after one that went well. It never makes a lane wait: it only bounds what is taken of what is there.
#[derive(Debug)]
pub struct Pace {
    size: usize,
    most: usize,
}

impl Pace {
    pub fn new(most: usize) -> Self {
        Pace { size: most.max(1), most: most.max(1) }
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// Learns how often members of a batch had to be run again.
    pub fn learn(&mut self, reruns: u32) {
        self.size = match reruns {
            0 => (self.size + 1).min(self.most),
            _ => (self.size / 2).max(1),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_shrink_by_half_and_grow_by_one() {
        let mut pace = Pace::new(32);
        let mut after = |reruns| {
            pace.learn(reruns);
            pace.size()
        };
        assert_eq!([after(0), after(1), after(0), after(3), after(0)], [32, 16, 17, 8, 9]);
        assert_eq!((0..5).map(|_| after(1)).last(), Some(1));
        assert_eq!((0..99).map(|_| after(0)).last(), Some(32));
    }
}
