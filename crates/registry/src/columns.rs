//! What the policy looks at of each resource: one column for each number, one slot in every column for each resource.
//!
//! A rebuild is a few passes over whole columns, four numbers at a time; rows of all numbers together would have each
//! pass fetch what it does not need. Who wants one resource takes its [`Row`].

use allocation::{LeftOut, Timestamp};

use crate::health::{self, Against, Checked, Facts, Flows, NewFlows, Said};

/// Makes [`Row`] and [`Columns`] of one list of fields.
macro_rules! columns {
    ($($(#[$doc:meta])* $field:ident: $type:ty,)*) => {
        /// The numbers of one resource.
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct Row {
            $($(#[$doc])* pub(crate) $field: $type,)*
        }

        /// The numbers of all resources of a pool, by slot. All columns have the same length.
        #[derive(Debug, Clone, Default)]
        pub(crate) struct Columns {
            $($(#[$doc])* pub(crate) $field: Vec<$type>,)*
        }

        impl Columns {
            /// One slot of every column.
            pub(crate) fn row(&self, slot: usize) -> Row {
                Row { $($field: self.$field[slot],)* }
            }

            /// Overwrites one slot of every column.
            pub(crate) fn set(&mut self, slot: usize, row: Row) {
                $(self.$field[slot] = row.$field;)*
            }

            /// Appends a slot to every column.
            pub(crate) fn push(&mut self, row: Row) {
                $(self.$field.push(row.$field);)*
            }
        }
    };
}

columns! {
    /// Whether it may get flows while its lease lasts: what [`Columns::decide`] made of the next five and its requirements.
    wanted: bool,
    /// False: nobody has the slot.
    occupied: bool,
    /// By its own report.
    ready: bool,
    /// By an operator.
    drained: bool,
    /// It is from before a restart, and has said nothing since.
    remembered: bool,
    /// By asking its service.
    checked: Checked,
    /// It has reported a rate of operations, now or before.
    carries_operations: bool,
    /// Which of the pool's tables it may be in, by the requirements it meets: a bit each. Bit 0 is the pool's own.
    tables: u64,
    /// The side of the pool's split that its version is on.
    side: u8,
    /// To how many balancers it reports.
    balancers: f32,
    /// gRFC A58's weight of its newest report; 0: that said nothing.
    reported_weight: f32,
    /// Since when its reports have had such a weight; [`Timestamp::NEVER`]: the newest has none.
    weighted_since: Timestamp,
    lease_until: Timestamp,
    joined: Timestamp,
    /// End of its slow start; the origin: it had none.
    slow_until: Timestamp,
    /// Of the newest accepted report; [`Timestamp::NEVER`]: none.
    reported: Timestamp,
    /// The last [`tick`] at which that report counts; 0: there is none.
    fresh_until: u32,
    stale_after_ms: u32,
    /// The weight it registered. Logarithms are to base 2, and taken when a number comes rather than at each rebuild.
    registered: f32,
    log_registered: f32,
    /// Averaged, with the error penalty.
    utilization: f32,
    log_utilization: f32,
    /// Averaged, in each [`crate::policy::RateUnit`].
    operations: f32,
    log_operations: f32,
    flows_opened: f32,
    log_flows_opened: f32,
    flows_open: f32,
    log_flows_open: f32,
    /// Where the weight is on its way to its target. The mean of a pool is 0.
    log_weight: f32,
    /// As published; 0: left out.
    weight: f32,
}

impl Columns {
    /// How many slots there are.
    pub(crate) fn len(&self) -> usize {
        self.occupied.len()
    }

    /// Says again whether the slot's resource may get flows.
    pub(crate) fn decide(&mut self, slot: usize) {
        let meets = self.tables[slot] & 1 == 1;
        self.wanted[slot] = self.occupied[slot] && meets && self.is_against(slot, Timestamp::ZERO).is_none();
    }

    /// What is known of the slot's resource, but for its flows, which only the dataplane knows.
    fn facts(&self, slot: usize, now: Timestamp) -> Facts {
        let said = match (self.ready[slot], self.remembered[slot]) {
            (false, _) => Said::NotReady,
            (true, true) => Said::Silent,
            (true, false) => Said::Ready,
        };
        Facts {
            drained: self.drained[slot],
            lease_holds: self.lease_until[slot] > now,
            said,
            checked: self.checked[slot],
            flows: Flows::Work,
        }
    }

    /// The same with them.
    pub(crate) fn facts_with(&self, slot: usize, flows: Flows, now: Timestamp) -> Facts {
        Facts { flows, ..self.facts(slot, now) }
    }

    /// What keeps the slot's resource out of every table, whatever its flows say.
    pub(crate) fn is_against(&self, slot: usize, now: Timestamp) -> Option<Against> {
        match health::judge(self.facts(slot, now)).new_flows {
            NewFlows::None(against) => Some(against),
            NewFlows::All | NewFlows::One => None,
        }
    }

    /// Why the slot's resource is left out of a table, if it is.
    pub(crate) fn left_out(&self, slot: usize, table: usize, now: Timestamp) -> LeftOut {
        match self.is_against(slot, now) {
            Some(Against::Operator) => LeftOut::Draining,
            Some(Against::Lease) => LeftOut::Expired,
            Some(Against::Itself) => LeftOut::NotReady,
            Some(Against::Checks) => LeftOut::ChecksFail,
            Some(Against::Unproven) => LeftOut::Unproven,
            None if self.tables[slot] >> table & self.tables[slot] & 1 == 0 => LeftOut::Requirement,
            // Selection asks the dataplane's own facts.
            Some(Against::Flows) | None => LeftOut::Not,
        }
    }
}

/// Time in 32 bits, for comparisons four at a time: units of 16 ms, which last for two years.
pub(crate) fn tick(at: Timestamp) -> u32 {
    u32::try_from(at.as_millis() >> 4).unwrap_or(u32::MAX)
}

impl Row {
    /// Whether it has reported, but not lately.
    pub(crate) fn is_stale(&self, now: Timestamp) -> bool {
        self.reported != Timestamp::NEVER && tick(now) > self.fresh_until
    }
}
